"""The picture: loss curves, the end of them closely, and how far each mode drifts from 64-true.

Curves of good modes lie on top of each other, and that is the finding: the first is drawn wide and each next one
narrower, so that all of them show. Colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from precision_lab.curves import curve, drift
from precision_lab.results import REFERENCE, Comparison, Row

_COLOURS = ("#999999", "#000000", "#E69F00", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#0072B2")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def save_plot(comparison: Comparison, path: Path) -> None:
    """Draws every mode that trained for at least a step; one that failed, up to there."""
    figure = Figure(figsize=(17, 5.2), layout="constrained")  # not pyplot: no window, no global state
    losses, end, drifts = figure.subplots(1, 3)
    rows = [row for row in comparison.rows if row.losses]
    for index, (row, colour, marker) in enumerate(zip(rows, cycle(_COLOURS), cycle(_MARKERS), strict=False)):
        style = _Style(colour, marker, width=max(1.2, 5.5 * 0.55**index))
        # Marks stand side by side to the right of the last step: on top of each other only the last one would show.
        place = comparison.steps * (1.015 + 0.015 * index)
        for axes in (losses, end):
            _draw_losses(axes, row, style, place)
        _draw_drift(drifts, row, comparison.find(REFERENCE), style)
    unit = "loss" if comparison.task else "loss in nats per byte"
    losses.set(xlabel="step", ylabel=unit, title="training loss (lines), held-out loss (marks)")
    end.set(xlabel="step", title="the last fifth of it")
    drifts.set(xlabel="step", ylabel="|L - L64| / L64", title="drift from 64-true: each step, and the most so far")
    _zoom(end, comparison, rows)
    for axes in (losses, end, drifts):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (losses, drifts):
        if axes.lines:
            axes.legend(frameon=False)
    if not drifts.lines:
        drifts.text(0.5, 0.5, "needs 64-true and another mode", ha="center", transform=drifts.transAxes, color="gray")
        drifts.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=120)


@dataclass(frozen=True)
class _Style:
    colour: str
    marker: str
    width: float


def _draw_losses(axes: Axes, row: Row, style: _Style, place: float) -> None:
    steps, losses = curve(row)
    axes.plot(steps, losses, color=style.colour, linewidth=style.width)
    label = _label(row)
    if row.held_out_loss is not None:
        label += f", held-out {row.held_out_loss:.3f}"
        axes.plot(place, row.held_out_loss, style.marker, color=style.colour, markersize=8, label=label)
    elif row.status == "failed":
        label += ", failed"
        axes.plot(steps[-1], losses[-1], "x", color=style.colour, markersize=10, markeredgewidth=2, label=label)


def _label(row: Row) -> str:
    return textwrap.fill(row.mode.replace(",", ", "), 36)  # a policy that is spelled out is longer than the picture


def _zoom(axes: Axes, comparison: Comparison, rows: list[Row]) -> None:
    """Shows the last fifth of the run, where the modes differ by less than a line is thick."""
    first = comparison.steps * 0.8
    seen = [row.held_out_loss for row in rows if row.held_out_loss is not None]
    for row in rows:
        steps, losses = curve(row)
        seen += losses[steps >= first].tolist()
    if seen:
        margin = 0.08 * (max(seen) - min(seen)) + 1e-3
        axes.set(ylim=(min(seen) - margin, max(seen) + margin))
    axes.set_xlim(first, comparison.steps * (1.03 + 0.015 * len(rows)))


def _draw_drift(axes: Axes, row: Row, reference: Row | None, style: _Style) -> None:
    if reference is None or row is reference:
        return
    values = drift(row, reference)
    label = f"{_label(row)}, at most {np.nan_to_num(values).max():.1e}"
    steps = np.arange(1, len(values) + 1)
    axes.semilogy(steps, values, color=style.colour, linewidth=0.8, alpha=0.35)
    axes.semilogy(steps, np.fmax.accumulate(values), color=style.colour, linewidth=2, label=label)
