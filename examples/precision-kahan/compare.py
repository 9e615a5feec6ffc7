"""bf16-kahan beside 32-true, bf16-true, and bf16-true with stochastic rounding (torchao): one GPT, the same batches.

    python compare.py --steps 300 --learning-rate 1e-4

The learning rate is 20 times lower than that of `precision compare`, where bf16-true loses next to nothing: AdamW moves
a weight by about the learning rate, and the weights here (0.05 to 0.1) have a bfloat16 spacing of 2.4e-4 to 4.9e-4. At
2e-3 nearly every update is larger than that, at 1e-4 most are lost. Long runs come to such rates at their end,
fine-tuning starts there.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from precision_core import Fabric
from precision_lab import train as lab
from precision_lab.gpt import GPT, GPTConfig
from precision_lab.memory import PeakMemory
from precision_lab.text import split_text

STOCHASTIC = "bf16-true, stochastic"
CONTENDERS = ("32-true", "bf16-true", "bf16-kahan", STOCHASTIC)


@dataclass
class Result:
    """What one contender did; sizes in bytes."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    held_out: float = 0.0
    params: int = 0
    compensation: int = 0
    state: int = 0
    peak: int = 0

    @property
    def train_loss(self) -> float:
        """The mean over the last tenth of the steps."""
        return statistics.fmean(self.losses[-max(1, len(self.losses) // 10) :])

    @property
    def step_seconds(self) -> float:
        """What a tenth of the steps stayed below: other work on the machine moves that less than the median."""
        return sorted(self.seconds)[len(self.seconds) // 10]


def run(contender: str, steps: int, rate: float, seed: int) -> Result:
    """Trains as `precision_lab.train` does, in a process of its own."""
    torch.use_deterministic_algorithms(True)
    result = Result()
    fabric = Fabric(accelerator="cpu", precision=contender.partition(",")[0])
    training, held_out = split_text()
    memory = PeakMemory(fabric.device)
    fabric.seed_everything(seed)
    model = GPT(GPTConfig())
    optimizer = make_optimizer(contender, model, rate)
    fabric.setup(model, optimizer)
    batches = torch.Generator().manual_seed(seed)
    for step in range(steps):
        start = time.perf_counter()
        inputs, targets = lab.draw_batch(training, model.config.context, batches)
        set_rate(optimizer, lab.learning_rate(step, steps) * rate / lab.LEARNING_RATE)
        optimizer.zero_grad()
        loss = lab.cross_entropy(model(inputs), targets)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=lab.MAX_NORM)
        optimizer.step()
        result.losses.append(loss.item())
        result.seconds.append(time.perf_counter() - start)
    result.peak = memory.read() or 0
    result.held_out = lab.evaluate(model, held_out, model.config.context)
    result.params = sum(param.nbytes for param in model.parameters())
    result.compensation = sum(v.nbytes for v in fabric.precision_plugin.state_dict().get("compensation", {}).values())
    result.state = lab.optimizer_bytes(optimizer)
    return result


def make_optimizer(contender: str, model: nn.Module, rate: float) -> Optimizer:
    """Returns AdamW with the same settings for all: torch's fused one, or torchao's that rounds stochastically."""
    settings: dict[str, Any] = {"lr": rate, "betas": lab.BETAS, "eps": lab.EPSILON, "weight_decay": lab.WEIGHT_DECAY}
    if contender != STOCHASTIC:
        return AdamW(model.parameters(), **settings, fused=True)
    from torchao.optim import _AdamW

    return _AdamW(model.parameters(), **settings, bf16_stochastic_round=True)


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Sets the learning rate of all groups; torchao's is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def table(results: dict[str, Result]) -> str:
    """Returns the figures as a Markdown table; drift is max |L - L32| / L32 over the steps."""
    true = results["32-true"].losses
    lines = [
        "| | train | held-out | drift | ms/step | params | compensation | optimizer | together | peak |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, each in results.items():
        drift = max(abs(loss - exact) / exact for loss, exact in zip(each.losses, true, strict=True))
        sizes = (each.params, each.compensation, each.state, each.params + each.compensation + each.state, each.peak)
        figures = [f"{each.train_loss:.4f}", f"{each.held_out:.4f}", f"{drift:.1e}"]
        figures += [f"{1000 * each.step_seconds:.0f}"] + [f"{size / 2**20:.1f}" for size in sizes]
        lines.append(f"| {name} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the contenders one after another and prints the table."""
    parser = argparse.ArgumentParser(description="Train in four ways, and compare.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    results = {}
    spawn = multiprocessing.get_context("spawn")
    for contender in CONTENDERS:
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:  # one process each: the peak is its own
            job = pool.submit(run, contender, arguments.steps, arguments.learning_rate, arguments.seed)
            try:
                results[contender] = job.result()
            except ModuleNotFoundError as error:
                print(f"{contender}: skipped, {error}: pip install torchao")
    print(table(results))


if __name__ == "__main__":
    main()
