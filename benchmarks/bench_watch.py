"""What `precision_lab.watch` costs: CPU time of a training step under it beside the same loop without.

The model is the GPT of `precision compare` (1.27 million parameters, batches of 4 x 128), the loop plain torch:
autocast, backward, clipping, AdamW. One thread, garbage collection off; blocks of steps alternate in one process. Shown
is the median of the ratios pair by pair, with its quartiles, over the half of the pairs that other work on the machine
disturbed least. Rows: a step that is not sampled; in all, with a sampled step in each 50; beside them torch's
`detect_anomaly`. Both loops start from the same weights and see the same batches; that they end with the same ones is
checked. The last row is an MLP whose step takes next to no time: what is added there is what a step takes anywhere.

Target: unsampled steps at most 1.00 as rounded to two places, in all at most 1.01.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from _measure import Comparison, interleave, keep_freed_memory, print_table, verdict
from torch import nn
from torch.nn.functional import cross_entropy

from precision_lab import watch
from precision_lab.gpt import GPT, GPTConfig

Step = Callable[[], None]


def main() -> None:
    options = argparse.ArgumentParser(description="CPU time per step under watch beside the loop without.")
    options.add_argument("--rounds", type=int, default=100, help="pairs of single steps")
    options.add_argument("--blocks", type=int, default=8, help="pairs of blocks of 50 steps")
    options.add_argument("--modes", default="32-true,bf16-mixed")
    given, _ = options.parse_known_args()  # other benchmarks may be run with the same arguments
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = []
    for mode in given.modes.split(","):
        for name, result, target in (
            ("watch, unsampled steps", watched(mode, 10**9, given.rounds, 1), 1.005),
            ("watch(every=50), in all", watched(mode, 50, given.blocks, 50), 1.01),
            ("torch.autograd.detect_anomaly", anomalies(mode, max(given.rounds // 4, 1)), None),
        ):
            cells = [f"{result.ours * 1e3:.1f}", f"{result.theirs * 1e3:.1f}", f"{result.ratio:.3f}"]
            rows.append([mode, name, *cells, f"{result.low:.3f} to {result.high:.3f}", verdict(result.ratio, target)])
    result = watched("tiny", 10**9, 2000, 1)
    more = f"+{(result.ours - result.theirs) * 1e6:.0f} us"
    rows.append(
        ["tiny MLP", "watch, unsampled steps", f"{result.ours * 1e3:.3f}", f"{result.theirs * 1e3:.3f}", more, "-", "-"]
    )
    head = ["mode", "loop", "ms a step", "without", "ratio", "quartiles", "target"]
    print_table("CPU time per step", head, rows)


def make(mode: str) -> tuple[nn.Module, torch.optim.Optimizer, Step]:
    """Returns a model, its optimizer, and a step; the same ones at each call."""
    torch.manual_seed(0)
    if mode == "tiny":
        return tiny()
    model = GPT(GPTConfig())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        ids = torch.randint(256, (4, 129), generator=generator)
        with torch.autocast("cpu", torch.bfloat16) if mode == "bf16-mixed" else nullcontext():
            logits = model(ids[:, :-1])
        cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step


def tiny() -> tuple[nn.Module, torch.optim.Optimizer, Step]:
    """Returns the same of an MLP."""
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    inputs = torch.randn(8, 32)

    def step() -> None:
        model(inputs).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step


def watched(mode: str, every: int, rounds: int, steps: int) -> Comparison:
    """Returns times of steps under watch beside those without."""
    model, optimizer, step = make(mode)
    other, _, other_step = make(mode)
    with tempfile.TemporaryDirectory() as folder:
        with watch(model, optimizer, every=every, file=Path(folder) / "run.jsonl") as context:

            def without() -> None:
                context.running = False
                other_step()
                context.running = True

            for _ in range(3 if steps == 1 else steps):
                step()
                without()
            result = interleave(step, without, rounds, steps)
        assert context.steps == rounds * steps + (3 if steps == 1 else steps) and not context.alarms
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), "watch changed what the loop computes"
    return result


def anomalies(mode: str, rounds: int) -> Comparison:
    """Returns times of steps under torch's own way to find NaN beside those without."""
    *_, step = make(mode)
    *_, other_step = make(mode)

    def checked() -> None:
        with torch.autograd.set_detect_anomaly(True):
            step()

    for _ in range(3):
        checked()
        other_step()
    return interleave(checked, other_step, rounds, 1)


if __name__ == "__main__":
    main()
