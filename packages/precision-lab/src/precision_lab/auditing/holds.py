"""What a rounded buffer holds, by its values: frequencies, positions, sines and cosines, running statistics."""

from __future__ import annotations

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
_SEVERAL = 1 << 22
_STATISTICS = ("running_mean", "running_var")


def holds(tensor: Tensor, name: str = "") -> str:
    """Returns "frequencies", "positions", "angles" or "statistics" for a tensor whose values are rounded to half.

    That is one of a half dtype, or one of float32 all of whose values are numbers of one of them, as a cast and a cast
    back leave it. Empty for all others.
    """
    if type(tensor) is not Tensor or not 4 <= tensor.numel() <= _SEVERAL or tensor.device.type == "meta":
        return ""
    if tensor.dtype in HALVES and name.rpartition(".")[2] in _STATISTICS:
        return "statistics"
    if tensor.dtype not in HALVES and rounded_to(tensor) is None:
        return ""
    value = tensor.detach().double().squeeze()
    if value.dim() == 1:
        return _of_a_row(value, tensor.dtype, name)
    if value.dim() >= 2 and _is_table(value.flatten(0, -3) if value.dim() > 2 else value[None]):
        return "angles"
    return ""


def rounded_to(tensor: Tensor) -> torch.dtype | None:
    """Returns the half dtype to which all values of a float32 tensor were rounded; None: they were not."""
    if tensor.dtype is not torch.float32:
        return None
    value = tensor.detach()
    fractions = torch.frexp(value).mantissa.abs()
    plain = (fractions == 0.5) | (value == value.round())  # powers of two, whole numbers
    if int((~plain).sum()) < 3 or _is_grid(value):
        return None
    return next((dtype for dtype in HALVES if bool((value.to(dtype).float() == value).all())), None)


def _is_grid(value: Tensor) -> bool:
    """Whether all are multiples of what half tells apart at the largest: made so, as steps of 1/4, not rounded."""
    largest = torch.frexp(value.abs().max())[1]
    steps = torch.ldexp(value.double(), 11 - largest)
    return bool((steps == steps.round()).all())


def _of_a_row(value: Tensor, dtype: torch.dtype, name: str) -> str:
    steps = value.diff()
    if bool((value == value.round()).all()):
        exact = 2**8 if dtype is torch.bfloat16 else 2**11
        goes_up = bool((steps >= 0).all()) and float(value[0]) >= 0
        return "positions" if goes_up and float(value[-1]) > exact and value.numel() > exact / 2 else ""
    if bool((value > 0).all()) and bool((steps < 0).all()) and float(value[0]) <= 1.5:
        logs = value.log()
        line = torch.linspace(float(logs[0]), float(logs[-1]), value.numel(), dtype=torch.float64)
        if "freq" in name or float((logs - line.to(logs.device)).abs().max()) < 0.02:  # names: of scaled ones, too
            return "frequencies"
    return ""


def _is_table(tables: Tensor) -> bool:
    """Whether each column is cos(p f) or sin(p f) of the row's number p, as far as halves tell."""
    table = tables[0]
    rows = table.shape[0]
    if rows < 8 or table.abs().max() > 1.01 or table.std() < 0.05:
        return False
    third = (rows - 1) // 3
    one, three = table[: third + 1], table[: 3 * third + 1 : 3]
    # cos 3x = 4 cos^3 x - 3 cos x and sin 3x = 3 sin x - 4 sin^3 x, so one of two signs fits each column.
    expected = 4 * one**3 - 3 * one
    starts = (table[0] - table[0].round()).abs() < 0.01
    as_cosine = ((three - expected).abs().amax(0) < 0.1) & (table[0] > 0.99)
    as_sine = ((three + expected).abs().amax(0) < 0.1) & (table[0].abs() < 0.01)
    return bool((starts & (as_cosine | as_sine)).all())
