"""Memory that saving and loading shards takes, of 255 MB of parameters and AdamW's state on each of two CPU ranks.

Shown is each rank's anonymous memory at its peak, above the live state; another process reads it each millisecond.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _measure import print_table
from bench_checkpoint import peak
from torch import nn

from precision_core import Fabric
from precision_fsdp import FSDPStrategy

LAYERS, WIDTH = 2, 4608  # shards of 42 MB: from 32 MiB on malloc keeps nothing that was freed
MB = 10**6


def main() -> None:
    argparse.ArgumentParser(description="Memory of sharded checkpoints.").parse_known_args()
    Fabric(accelerator="cpu", devices=2).launch()
    torch.set_num_threads(1)
    rows = [row for kind in ("sharded", "full") for row in measure(kind)]
    if rows:
        print_table("anonymous memory above the live state", ("checkpoint", "what", "MB on rank 0", "on rank 1"), rows)


def measure(kind: str) -> list[tuple[str, ...]]:
    """Returns the rows of the table, on rank zero."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy=FSDPStrategy(state_dict_type=kind))
    model = fabric.setup(nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.zero_grad()
    state = {"model": model, "optimizer": optimizer}
    with tempfile.TemporaryDirectory() as mine:
        path = Path(fabric.broadcast(mine), "checkpoint")
        fabric.save(path, state)
        fabric.load(path, state)  # what is imported and warmed up by the first is not counted
        peaks = {
            "save": peaks_of(fabric, lambda: fabric.save(path, state)),
            "save, wait=False": peaks_of(fabric, lambda: fabric.save(path, state, wait=False).wait()),
            "load": peaks_of(fabric, lambda: fabric.load(path, state)),
        }
        optimizer.state.clear()
        peaks["load into an optimizer without state"] = peaks_of(fabric, lambda: fabric.load(path, state))
        fabric.barrier()
    fabric.teardown()
    rows = [(kind, what, *(f"{each / MB:.0f}" for each in ranks)) for what, ranks in peaks.items()]
    return rows if fabric.is_global_zero else []


def peaks_of(fabric: Fabric, function: Callable[[], Any]) -> list[int]:
    """Returns how many bytes more than before each rank had at its peak."""
    fabric.barrier()
    return fabric.all_gather(torch.tensor(peak(function))).tolist()


if __name__ == "__main__":
    main()
