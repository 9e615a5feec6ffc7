"""Time of a conversion by number of layers: blocks of a norm and two linear layers become the reference's, on meta.

Shown is CPU time per linear layer, the smallest of several rounds, with garbage collection off. It should not grow with
the number of layers. What engine te adds is the construction of the vendor's layers, which needs its library.
"""

from __future__ import annotations

import argparse
import gc
import time

import torch
from _measure import print_table, verdict
from torch import nn

from precision_te import TransformerEnginePrecision

TARGET = 1.3
"""Of the time per layer among the fewest layers."""


def main() -> None:
    options = argparse.ArgumentParser(description="Time of a conversion by number of layers.")
    options.add_argument("--rounds", type=int, default=9, help="conversions of each model")
    given, _ = options.parse_known_args()  # other benchmarks may be run with the same arguments
    torch.set_num_threads(1)
    counts = (100, 200, 400, 800, 1600)
    times = {count: min(measure(count) for _ in range(given.rounds)) for count in counts}
    first = times[counts[0]] / counts[0]
    rows = []
    for count, seconds in times.items():
        ratio = seconds / count / first
        cells = [f"{seconds * 1e3:.1f}", f"{seconds / count * 1e6:.0f}", f"{ratio:.2f}", verdict(ratio, TARGET)]
        rows.append([str(count), *cells])
    print_table("conversion", ["linear layers", "ms", "us a layer", "ratio", "target"], rows)


def measure(count: int) -> float:
    """Returns the CPU seconds of one conversion of `count` linear layers."""
    with torch.device("meta"):
        blocks = [nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(count // 2)]
        model = nn.Sequential(*blocks)
    plugin = TransformerEnginePrecision("bf16-mixed", engine="reference", keep_first=1)
    gc.collect()
    gc.disable()
    try:
        start = time.process_time()
        plugin.convert_module(model)
        return time.process_time() - start
    finally:
        gc.enable()


if __name__ == "__main__":
    main()
