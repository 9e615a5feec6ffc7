"""Is a mode whose updates round to nothing worse in longer runs, where its loss is as good in short ones?

    python benchmarks/bench_swallow.py                      # conv and LSTM of choose_models.py
    python benchmarks/bench_swallow.py conv --times 1 5     # one of them, at its own number of steps and five times it

32-true and bf16-true with five seeds, at a rate that falls to zero and at a tenth of it that stays. A line of JSON
each: by how much bf16-true's held-out loss is above 32-true's of the same seed, with its standard error; 32-true's
standard deviation over seeds; the difference in these ("spreads"); the share of the updates that round to nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from choose_models import MODELS
from rich.console import Console

from precision_lab.process import Fork
from precision_lab.runs import Runs
from precision_lab.task import understood
from precision_lab.taskfile import guarded

SEEDS = [7000 + n for n in range(5)]


def at_a_rate(make: Callable[[], Any], stays: bool) -> Callable[[], Any]:
    """Returns `make` as it is, with a rate that falls, or with a tenth of the rate, which stays."""

    def made() -> Any:
        task = understood(make())
        if stays:
            task.schedule = None
            for group in task.optimizer.param_groups:
                group["lr"] /= 10
        return task

    return made


def measure(name: str, times: int, stays: bool) -> dict[str, Any]:
    """Returns the figures of one model at so many times its steps."""
    make, steps, _ = MODELS[name]
    assert make is not None
    made = guarded(at_a_rate(make, stays))
    runs = Runs(name, "1m", "cpu", lambda job, told: Fork(job, made, told), Console(quiet=True))
    base, half = (runs.single(mode, times * steps, SEEDS) for mode in ("32-true", "bf16-true"))
    losses = [[row.held_out_loss or 0.0 for row in rows] for rows in (base, half)]
    pairs = [b - a for a, b in zip(*losses, strict=True)]
    spread = statistics.stdev(losses[0])
    return {
        "model": name,
        "steps": times * steps,
        "rate": "a tenth, stays" if stays else "falls to zero",
        "32-true": statistics.fmean(losses[0]),
        "bf16-true": statistics.fmean(losses[1]),
        "difference": statistics.fmean(pairs),
        "error": statistics.stdev(pairs) / math.sqrt(len(pairs)),
        "spread": spread,
        "spreads": statistics.fmean(pairs) / spread,
        "unchanged": max(row.unchanged_share for row in half),
    }


def main() -> None:
    """Measures what is named, and prints a line each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=["conv", "LSTM"])
    parser.add_argument("--times", nargs="*", type=int, default=[1, 5, 10], help="times the steps of bench_choose.py")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.models:
        for times in arguments.times:
            for stays in (False, True):
                print(json.dumps(measure(name, times, stays)), flush=True)


if __name__ == "__main__":
    main()
