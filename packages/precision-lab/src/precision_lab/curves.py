"""Curves as they are drawn: smoothed losses, and drift."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from precision_lab.results import Row


def curve(row: Row) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the steps, from 1, and the losses, each the mean over a fifteenth of the run."""
    window = max(1, len(row.losses) // 15)
    return np.arange(1.0, len(row.losses) + 1), smooth(row.losses, window)


def drift(row: Row, reference: Row) -> NDArray[np.float64]:
    """Returns |L - L64| / |L64| of each step; NaN where it is zero, which has no place on a logarithmic axis."""
    true = np.array(reference.losses[: len(row.losses)])
    values = np.abs(np.array(row.losses) - true) / np.maximum(np.abs(true), np.finfo(float).tiny)
    values[values == 0] = np.nan
    return values


def smooth(losses: list[float], window: int) -> NDArray[np.float64]:
    """Returns for each step the mean of the last `window` losses up to it, of fewer at the start."""
    sums = np.cumsum([0.0, *losses])
    ends = np.arange(1, len(sums))
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)
