"""The master modes and bf16-stochastic: bytes a parameter, kept and at the step's peak, and the time of an update.

    OMP_NUM_THREADS=1 python benchmarks/bench_master.py

AdamW(fused=True) over 256 tensors of 20 million parameters. Each contender runs in a process of its own. "kept" is what
parameters, gradients and state take together; "between steps" and "at the peak" are what the process has resident
before a step and the most that it has while it steps (VmRSS and VmHWM, Linux), over what it had before there was a
model: code and Python's objects are in both. "update" is the median over rounds of the time of one update, over that of
torch's fused AdamW on float32 parameters in the same round, in turns: another load slows both.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from precision_core import Fabric

TENSORS, ROWS, COLUMNS = 256, 256, 308  # 20.2 million
TORCHAO = "torchao _AdamW, stochastic"
CONTENDERS = (
    *("32-true", "bf16-mixed", "bf16-true", "16-master", "bf16-master"),
    "params=bfloat16,master=float32,state=bfloat16",
    "bf16-stochastic",
    TORCHAO,
)


def make(contender: str) -> tuple[Fabric, nn.Module, Optimizer]:
    """Returns a model of nothing but matrices, set up, with gradients."""
    torch.manual_seed(0)
    fabric = Fabric("cpu", precision="bf16-true" if contender == TORCHAO else contender)
    model = nn.ParameterList(nn.Parameter(torch.randn(ROWS, COLUMNS) * 0.02) for _ in range(TENSORS))
    if contender == TORCHAO:
        from torchao.optim import _AdamW

        model = fabric.setup(model)
        optimizer = fabric.setup_optimizers(_AdamW(model.parameters(), lr=1e-4, bf16_stochastic_round=True))
    else:
        optimizer = AdamW(model.parameters(), lr=1e-4, fused=True, eps=1e-6)
        fabric.setup(model, optimizer)
    for param in model.parameters():
        param.grad = torch.randn(ROWS, COLUMNS).mul_(1e-3).to(param.dtype)
    ready(fabric)
    return fabric, model, optimizer


def ready(fabric: Fabric) -> None:
    """Has gradients that are there carry the loss scale, where the mode scales."""
    if fabric.precision_plugin.policy.scale:
        fabric.backward(torch.zeros((), requires_grad=True))


def tensors(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    return [*state, *model.parameters(), *(param.grad for param in model.parameters() if param.grad is not None)]


def memory(contender: str) -> tuple[float, float, float]:
    """Returns bytes a parameter: kept, resident between steps, and resident at the peak of a step."""
    small = AdamW([nn.Parameter(torch.ones(4096))], fused=True)  # what libraries allocate on first use
    small.param_groups[0]["params"][0].grad = torch.ones(4096)
    small.step()
    before = _resident("VmRSS")
    fabric, model, optimizer = make(contender)
    optimizer.step()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # of setup nothing is left
    between = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    for _ in range(3):
        ready(fabric)
        optimizer.step()
    size = TENSORS * ROWS * COLUMNS
    kept = sum(tensor.nbytes for tensor in tensors(model, optimizer))
    return kept / size, (between - before) / size, (_resident("VmHWM") - before) / size


def _resident(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024  # "  1234 kB"


def timed(fabric: Fabric, optimizer: Optimizer) -> float:
    ready(fabric)
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


def update(contender: str, rounds: int) -> float:
    """Returns the median of (time of an update) / (that of torch's fused AdamW on float32)."""
    fabric, _, optimizer = make(contender)
    other, _, plain = make("32-true")
    for each in (optimizer, plain):
        each.step()
    return statistics.median(timed(fabric, optimizer) / timed(other, plain) for _ in range(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS))
    arguments = parser.parse_args()
    print("| | kept | between steps | at the peak | update |\n| --- | --- | --- | --- | --- |")
    for contender in arguments.contenders:
        kept, between, peak = _alone(memory, contender)
        ratio = _alone(update, contender, arguments.rounds)
        print(f"| {contender} | {kept:.2f} | {between:.2f} | {peak:.2f} | {ratio:.2f} |", flush=True)


def _alone(function: Any, *args: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


if __name__ == "__main__":
    main()
