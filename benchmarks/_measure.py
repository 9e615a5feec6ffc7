"""What the benchmarks share: times of two loops side by side, bytes of live tensors, and the table."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Step = Callable[[], object]


@dataclass(frozen=True)
class Comparison:
    """Times in seconds per step, and the ratio of ours to theirs: its median over pairs and its quartiles."""

    ours: float
    theirs: float
    ratio: float
    low: float
    high: float


def interleave(
    ours: Step, theirs: Step, rounds: int, steps: int, clock: Callable[[], float] = time.process_time
) -> Comparison:
    """Times `rounds` pairs of blocks of `steps` steps, the order swapped from round to round.

    The clock is by default the process's CPU time, so what other processes take is not counted; what they do to caches
    and clock rates is, for both blocks of a pair alike, since those lie milliseconds apart. Hence a ratio per pair, and
    its median over the half of the pairs that took least, both blocks together. Garbage collection is off meanwhile.
    """
    pairs = []
    gc.collect()
    gc.disable()
    for number in range(rounds):
        if number % 2:
            mine, other = _time(ours, steps, clock), _time(theirs, steps, clock)
        else:
            other, mine = _time(theirs, steps, clock), _time(ours, steps, clock)
        pairs.append((mine, other))
    gc.enable()
    pairs = sorted(pairs, key=sum)[: (rounds + 1) // 2]
    low, ratio, high = statistics.quantiles([mine / other for mine, other in pairs], n=4)
    return Comparison(
        ours=statistics.median(mine for mine, _ in pairs),
        theirs=statistics.median(other for _, other in pairs),
        ratio=ratio,
        low=low,
        high=high,
    )


def _time(step: Step, steps: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(steps):
        step()
    return (clock() - start) / steps


def keep_freed_memory() -> None:
    """Has glibc keep what is freed: how often it gives pages back, to fault them in anew, is decided by addresses.

    That costs one of two loops with the same allocations up to a seventh of its time. Other C libraries do as they do.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    for parameter, value in ((-1, 2**31 - 1), (-3, 2**25)):  # M_TRIM_THRESHOLD; M_MMAP_THRESHOLD, the most it takes
        mallopt(parameter, value)


def verdict(value: float, target: float | None, strict: bool = False) -> str:
    """Returns the target and whether `value` keeps it (`strict`: stays below it)."""
    if target is None:
        return "-"
    kept = value < target if strict else value <= target
    return f"{'<' if strict else '<='} {target:g} {'ok' if kept else 'over'}"


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints left-aligned columns under a title with torch's version."""
    table = [head, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    print(f"\n{title} (torch {torch.__version__})")
    for row in table:
        print("  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
