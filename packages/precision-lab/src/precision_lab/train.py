"""One training run in one precision, in a process of its own.

    python -m precision_lab.train bf16-mixed --steps 300 --seed 0

trains the GPT through `Fabric` and prints one JSON object a line: what runs where, the policy, then each step's loss
and seconds, then the rest of the figures. `precision compare` reads these lines; by hand they, and the whole traceback
of a mode that fails, are one command away.

The same seed means the same start for every mode: weights are drawn in float32 and cast afterwards, batches come from
a generator of their own, and deterministic algorithms make a second run the same bit for bit. What then differs
between two modes is the precision and nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precision_core import Fabric
from precision_lab.gpt import GPT, GPTConfig
from precision_lab.memory import PeakMemory
from precision_lab.results import policy_as_dict
from precision_lab.text import split_text

BATCH = 4
LEARNING_RATE = 2e-3
WARMUP = 30
"""Steps over which the learning rate rises, a tenth of all at most; it then falls to zero in a straight line."""
BETAS = (0.9, 0.99)
EPSILON = 1e-5
"""AdamW divides by the root of a mean of squared gradients, plus this. torch's 1e-8 is too little for 16-true: squares
below 6e-8 are zero in float16, and a loss is NaN at the third step."""
WEIGHT_DECAY = 0.1
MAX_NORM = 1.0

EVALUATION_BATCH = 32


@dataclass(frozen=True)
class Job:
    """The arguments of one training run."""

    mode: str
    steps: int
    seed: int
    accelerator: str = "auto"
    devices: int = 1
    """Processes, one a device, that share each batch."""
    strategy: str = "auto"


def train(job: Job) -> Iterator[dict[str, Any]]:
    """Trains, and yields figures as plain values at the start, after each step, and at the end.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    fabric = Fabric(job.accelerator, job.strategy, job.devices, job.mode)
    training, held_out = (part.to(fabric.device) for part in split_text())
    memory = PeakMemory(fabric.device)

    fabric.seed_everything(job.seed)
    model = GPT(GPTConfig())  # in float32 on the CPU, whatever the mode and the device: the same weights for all
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY, fused=True
    )
    description = run_metadata(fabric.device, model)  # of the whole model, which setup may shard
    model, optimizer = fabric.setup(model, optimizer)
    yield description | {"devices": fabric.world_size}
    yield {"policy": policy_as_dict(fabric.precision_plugin.policy)}

    batches = torch.Generator().manual_seed(job.seed)
    for step in range(job.steps):
        start = time.perf_counter()
        batch = draw_batch(training, model.config.context, batches)  # the same on every rank, which takes its share
        inputs, targets = (part.chunk(fabric.world_size)[fabric.global_rank] for part in batch)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, job.steps)
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), targets)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=MAX_NORM)
        optimizer.step()
        value = fabric.all_reduce(loss).item()  # waits for the device, so that the time is the step's
        if not math.isfinite(value):
            raise FloatingPointError(f"the training loss is {value} at step {step + 1}")
        yield {"step": step + 1, "loss": value, "seconds": time.perf_counter() - start}

    # Memory is read before evaluation, which is not part of training.
    params = [part for part in map(local_shard, model.parameters()) if part.numel()]
    gradients = [local_shard(param.grad) for param in model.parameters() if param.grad is not None]
    figures = {  # of this process; None where an engine does not show what it holds
        "parameter_bytes": sum(param.nbytes for param in params) or None,
        "gradient_bytes": sum(gradient.nbytes for gradient in gradients) or None,
        "optimizer_bytes": optimizer_bytes(optimizer),
        "peak_memory_bytes": memory.read(),
        "skipped_steps": fabric.precision_plugin.skipped_steps,
    }
    held_out_loss = evaluate(model, held_out, model.config.context)  # on every rank: each may hold a shard
    if not math.isfinite(held_out_loss):
        raise FloatingPointError(f"the held-out loss is {held_out_loss} after training")
    yield figures | {"held_out_loss": held_out_loss}


def run_metadata(device: torch.device, model: nn.Module) -> dict[str, Any]:
    """Returns device, versions, and the number of parameters."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": device.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "parameters": sum(param.numel() for param in model.parameters()),
    }


def draw_batch(data: Tensor, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns inputs and targets (batch, context): random windows of the text, and the same one byte later."""
    starts = torch.randint(len(data) - context, (BATCH, 1), generator=generator).to(data.device)
    windows = data[starts + torch.arange(context + 1, device=data.device)]
    return windows[:, :-1], windows[:, 1:]


def learning_rate(step: int, steps: int) -> float:
    """Returns the rate of a step, counted from 0: up over the first steps (a tenth at most), then down to zero."""
    warmup = max(1, min(WARMUP, steps // 10))
    return LEARNING_RATE * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup), 1.0)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean loss in nats per byte."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def evaluate(model: nn.Module, data: Tensor, context: int) -> float:
    """Returns the mean loss over `data`, cut into windows side by side; a last one that is not full is left out."""
    count = (len(data) - 1) // context
    inputs = data[: count * context].view(count, context)
    targets = data[1 : count * context + 1].view(count, context)
    total = 0.0
    with torch.no_grad():
        for some_inputs, some_targets in zip(
            inputs.split(EVALUATION_BATCH), targets.split(EVALUATION_BATCH), strict=True
        ):
            total += cross_entropy(model(some_inputs), some_targets).item() * len(some_inputs)
    return total / count


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Returns the bytes of all tensors in the optimizer's state that are in this process."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(local_shard(value).nbytes for value in values if isinstance(value, Tensor))


def local_shard(tensor: Tensor) -> Tensor:
    """Returns this process's shard of a tensor, all of a plain one."""
    to_local = getattr(tensor, "to_local", None)  # of a DTensor
    return tensor if to_local is None else to_local()


def settings() -> dict[str, Any]:
    """Returns the constants of this file and the model's sizes, for compare.json."""
    return {
        "model": asdict(GPTConfig()),
        "batch": BATCH,
        "optimizer": "AdamW",
        "learning_rate": LEARNING_RATE,
        "warmup": WARMUP,
        "betas": list(BETAS),
        "epsilon": EPSILON,
        "weight_decay": WEIGHT_DECAY,
        "max_norm": MAX_NORM,
    }


def main() -> None:
    """Runs one job from the command line."""
    parser = argparse.ArgumentParser(prog="python -m precision_lab.train", description="Train in one precision.")
    parser.add_argument("mode")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", type=int, default=1, help="under torchrun: how many processes it started")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--until-stdin-closes", action="store_true", help="end with the process at the other end of it")
    arguments = vars(parser.parse_args())
    if arguments.pop("until_stdin_closes"):
        threading.Thread(target=_exit_with_parent, daemon=True).start()

    # Whatever a library prints belongs to stderr: stdout carries our lines only.
    sys.stdout.flush()
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    torch.use_deterministic_algorithms(True)  # for the whole process, which is ours
    # Nothing here reads memory before it writes it, and engines allocate gigabytes that they use little of.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    for event in train(Job(**arguments)):
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(event, allow_nan=False), file=lines, flush=True)


def _exit_with_parent() -> None:
    """Ends this process when its parent does, however that died: the system then closes the pipe to our stdin."""
    while os.read(0, 1):  # os.read, because a thread that waits in sys.stdin would block the interpreter's exit
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
