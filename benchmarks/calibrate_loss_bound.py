"""The distances between which `precision_core.testing.loss_bound` lies: legitimate variations, and controls.

For each mode and number of steps, over all seeds: the variation that is farthest from the mode's curve, the control
that is nearest to it, and both as multiples of the bound. AdamW is compared beside, without controls, since it does
not see a factor on gradients. One run serves all numbers of steps: a shorter curve is the start of a longer one.

Takes an hour on one thread of a CPU, where float16 products are slow; `--modes` and `--seeds` take less.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from _measure import print_table

from precision_core import MODES, Fabric
from precision_core.testing import Problem, adamw, controls, curve_distance, loss_bound, train, variations

Curves = dict[str, list[float]]


def main() -> None:
    options = argparse.ArgumentParser(description="Distances of training curves, by mode.")
    options.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--steps", type=int, nargs="+", default=[20, 50, 100, 300])
    options.add_argument("--accelerator", default="cpu")
    options.add_argument("--details", action="store_true", help="every variation and control")
    given = options.parse_args()
    torch.set_num_threads(1)
    summary = []
    for mode in given.modes:
        distances: dict[tuple[str, str], list[list[float]]] = {}
        for seed in range(given.seeds):
            for kind, (reference, curves) in measure(mode, Problem(seed), max(given.steps), given.accelerator).items():
                for name, curve in curves.items():
                    row = [curve_distance(curve[:steps], reference[:steps]) for steps in given.steps]
                    distances.setdefault((kind, name), []).append(row)
        if given.details:
            print_details(mode, given.steps, distances)
        for column, steps in enumerate(given.steps):
            summary.append([mode, f"{steps}", *cells(mode, steps, column, distances)])
    head = ["mode", "steps", "bound", "farthest variation", "", "/ bound", "nearest control", "", "/ bound", "AdamW"]
    print_table(f"loss_bound, {given.seeds} seeds", head, summary)


def measure(mode: str, problem: Problem, steps: int, accelerator: str) -> dict[str, tuple[list[float], Curves]]:
    """Returns kind -> (reference, curves by name)."""

    def make(mode: str) -> Fabric:
        return Fabric(accelerator, precision=mode)

    reference = train(make(mode), problem, steps=steps)
    adam = train(make(mode), problem, steps=steps, optimizer=adamw)
    return {
        "variation": (reference, {name: run(problem, steps) for name, run in variations(mode, accelerator).items()}),
        "control": (reference, {name: each.run(make, problem, steps) for name, each in controls(mode).items()}),
        "AdamW": (
            adam,
            {
                f"{number} microbatches": train(make(mode), problem, steps=steps, accumulate=number, optimizer=adamw)
                for number in (2, 3)
            },
        ),
    }


def cells(mode: str, steps: int, column: int, distances: dict[tuple[str, str], list[list[float]]]) -> tuple[str, ...]:
    """Returns what the summary says of one mode after so many steps."""
    bound = loss_bound(mode, steps)
    found = {
        wanted: [(row[column], name) for (kind, name), rows in distances.items() if kind == wanted for row in rows]
        for wanted in ("variation", "control", "AdamW")
    }
    far, near, adam = max(found["variation"]), min(found["control"]), max(found["AdamW"])
    ends = [cell for value, name in (far, near) for cell in (name, f"{value:.1e}", f"{value / bound:.2f}")]
    return (f"{bound:.1e}", *ends, f"{adam[0]:.1e}")


def print_details(mode: str, steps: Sequence[int], distances: dict[tuple[str, str], list[list[float]]]) -> None:
    """Prints the least and largest distance over seeds of every run."""
    rows = [
        [kind, name, *(f"{min(column):.1e} to {max(column):.1e}" for column in zip(*of_seeds, strict=True))]
        for (kind, name), of_seeds in distances.items()
    ]
    print_table(mode, ["", "run", *(f"{count} steps" for count in steps)], rows)


if __name__ == "__main__":
    main()
