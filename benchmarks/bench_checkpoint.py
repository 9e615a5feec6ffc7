"""Time and memory of a checkpoint beside torch.save and torch.load.

A model of `--gigabytes` is saved and loaded, by turns with `fabric.save` and `fabric.load`, checksums included, and
with torch.save and torch.load. Held against their targets are the time of both together, in wall-clock seconds (a disk
takes no CPU time): at most 1.1 times torch's; and the anonymous memory at the peak beyond the live state: at most 5 %
of that and one tensor. Torch's load returns new tensors; into the live model it is timed with `load_state_dict`.

`fabric.save` waits until the file is on the disk, torch.save does not. So that neither pays for what the other left to
be written, the disk is idle before each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _measure import print_table, verdict
from torch import nn

from precision_core import Fabric

TIME_TARGET = 1.1
TENSOR = 40 * 2**20  # bytes; from 32 MiB on malloc keeps nothing that was freed
MB = 10**6


def main() -> None:
    options = argparse.ArgumentParser(description="Time and memory of a checkpoint beside torch's.")
    options.add_argument("--gigabytes", type=float, default=0.25, help="of parameters")
    options.add_argument("--rounds", type=int, default=5, help="pairs of measurements")
    given, _ = options.parse_known_args()  # other benchmarks may be run with the same arguments
    count = max(1, round(given.gigabytes * 10**9 / TENSOR))
    model = nn.ParameterList(torch.randn(TENSOR // 4) for _ in range(count))
    fabric, state = Fabric(accelerator="cpu"), {"model": model}
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours.ckpt"), Path(folder, "theirs.ckpt")

        def torchs_save() -> None:
            torch.save({"model": model.state_dict()}, theirs)

        def torchs_load_into() -> None:
            model.load_state_dict(torch.load(theirs, weights_only=True)["model"])

        steps: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "save": (lambda: fabric.save(ours, state), torchs_save),
            "load into the model": (lambda: fabric.load(ours, state), torchs_load_into),
            "load alone": (lambda: fabric.load(ours), lambda: torch.load(theirs, weights_only=True)),
        }
        for mine, other in steps.values():  # warms the file cache
            mine()
            other()
        times = measure(list(steps.values()), given.rounds)
        peaks = {name: (peak(mine), peak(other)) for name, (mine, other) in steps.items()}
    report(list(steps), times, peaks, count * TENSOR)


def measure(
    steps: list[tuple[Callable[[], object], Callable[[], object]]], rounds: int
) -> list[list[tuple[float, float]]]:
    """Returns seconds of ours and theirs, a row a round and a column a step; who is first changes with the round."""
    rows = []
    for number in range(rounds):
        row: list[tuple[float, float]] = []
        for mine, other in steps:
            if number % 2:
                other_time = seconds(other)
                row.append((seconds(mine), other_time))
            else:
                row.append((seconds(mine), seconds(other)))
        rows.append(row)
    return rows


def seconds(function: Callable[[], object]) -> float:
    if hasattr(os, "sync"):
        os.sync()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


WATCH = """
import sys, time
path, highest = sys.argv[1], 0
print(flush=True)
while True:
    try:
        text = open(path).read()
    except OSError:
        break
    highest = max(highest, int(text.split("RssAnon:")[1].split()[0]))
    print(highest, flush=True)
    time.sleep(0.001)
"""


def peak(function: Callable[[], object]) -> int:
    """Returns how many bytes of memory that no file stands behind `function` took at its peak; 0 without Linux's /proc.

    Another process watches, as torch.load lets no other thread of this one run.
    """
    status = Path(f"/proc/{os.getpid()}/status")
    if not status.exists():
        return 0
    with tempfile.TemporaryFile("w+") as output:
        watcher = subprocess.Popen([sys.executable, "-c", WATCH, str(status)], stdout=output)
        while not output.tell():
            time.sleep(0.01)
            output.seek(0, os.SEEK_END)
        before = int(status.read_text().split("RssAnon:")[1].split()[0])
        function()
        watcher.kill()
        watcher.wait()
        output.seek(0)
        highest = max(int(line) for line in output.read().split())
    return 1024 * max(0, highest - before)


def report(
    names: list[str], times: list[list[tuple[float, float]]], peaks: dict[str, tuple[int, int]], size: int
) -> None:
    """Prints a row a step, and one for save and load together; ratios are medians over the rounds' own ratios."""
    allowed = 0.05 * size + TENSOR
    rows = []
    for column, name in enumerate(names):
        pairs = [row[column] for row in times]
        kept = verdict(peaks[name][0] / MB, round(allowed / MB)) if name != "load alone" else "- (new tensors)"
        rows.append([name, *_times(pairs), "-", *(f"{each / MB:.0f}" for each in peaks[name]), kept])
    for load in (1, 2):
        pairs = [(row[0][0] + row[load][0], row[0][1] + row[2][1]) for row in times]
        ratio = statistics.median(mine / other for mine, other in pairs)
        rows.append([f"save + {names[load]}", *_times(pairs), verdict(ratio, TIME_TARGET), "", "", ""])
    head = ["", "s", "torch's", "ratio", "lowest to highest", "target", "peak MB", "torch's", "target"]
    print_table(f"checkpoint of {size / 10**9:.2f} GB; sums against torch.save + torch.load", head, rows)


def _times(pairs: list[tuple[float, float]]) -> list[str]:
    ratios = [mine / other for mine, other in pairs]
    medians = (statistics.median(mine for mine, _ in pairs), statistics.median(other for _, other in pairs))
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return [f"{medians[0]:.2f}", f"{medians[1]:.2f}", f"{statistics.median(ratios):.2f}", spread]


if __name__ == "__main__":
    main()
