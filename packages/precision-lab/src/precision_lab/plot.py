"""The picture: loss curves on the left, how far each mode drifts from 64-true on the right.

Curves of good modes lie on top of each other, and that is the finding: the first is drawn wide and each next one
narrower, so that all of them show. Colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from precision_lab.results import REFERENCE, Comparison, Row

_COLOURS = ("#999999", "#000000", "#E69F00", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#0072B2")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def save_plot(comparison: Comparison, path: Path) -> None:
    """Draws every mode that trained for at least a step; one that failed, up to there."""
    figure = Figure(figsize=(13, 5.5), layout="constrained")  # not pyplot: no window, no global state
    losses, drift = figure.subplots(1, 2)
    rows = [row for row in comparison.rows if row.losses]
    for index, (row, colour, marker) in enumerate(zip(rows, cycle(_COLOURS), cycle(_MARKERS))):
        width = max(1.2, 5.0 - 1.3 * index)
        _draw_losses(losses, row, colour, width)
        if row.held_out_loss is not None:
            # Side by side to the right of the last step, since on top of each other only the last one would show.
            place = comparison.steps * (1.03 + 0.03 * index)
            losses.plot(place, row.held_out_loss, marker, color=colour, markersize=8, clip_on=False)
        _draw_drift(drift, row, comparison.find(REFERENCE), colour)
    losses.set(xlabel="step", ylabel="loss in nats per byte", title="training loss (lines), held-out loss (marks)")
    drift.set(xlabel="step", ylabel="|L - L64| / L64", title="drift from 64-true: each step, and the most so far")
    for axes in (losses, drift):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    if not drift.lines:
        drift.text(0.5, 0.5, "needs 64-true and another mode", ha="center", transform=drift.transAxes, color="gray")
        drift.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=120)


def _draw_losses(axes: Axes, row: Row, colour: str, width: float) -> None:
    window = max(1, len(row.losses) // 15)
    label = row.mode if row.held_out_loss is None else f"{row.mode}, held-out {row.held_out_loss:.3f}"
    label += " (failed)" if row.status == "failed" else ""
    steps = np.arange(1, len(row.losses) + 1)
    axes.plot(steps, smooth(row.losses, window), color=colour, linewidth=width, label=label)
    if row.status == "failed":
        axes.plot(steps[-1], smooth(row.losses, window)[-1], "x", color=colour, markersize=10, markeredgewidth=2)


def _draw_drift(axes: Axes, row: Row, reference: Row | None, colour: str) -> None:
    if reference is None or row is reference:
        return
    true = np.array(reference.losses[: len(row.losses)])
    drift = np.abs(np.array(row.losses) - true) / true
    drift[drift == 0] = np.nan  # has no place on a logarithmic axis
    steps = np.arange(1, len(drift) + 1)
    axes.semilogy(steps, drift, color=colour, linewidth=0.8, alpha=0.35)
    most = np.fmax.accumulate(drift)
    axes.semilogy(steps, most, color=colour, linewidth=2, label=f"{row.mode}, at most {np.nanmax(drift):.1e}")


def smooth(losses: list[float], window: int) -> NDArray[np.float64]:
    """Returns for each step the mean of the last `window` losses up to it, of fewer at the start."""
    sums = np.cumsum([0.0, *losses])
    ends = np.arange(1, len(sums))
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)
