"""Whether a saved tensor fits a live one: the rule, and how what does not fit is said."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from precision_core.checkpoint.error import CheckpointError
from precision_core.policy.dtypes import FLOAT_DTYPES


def misfit(saved: Tensor, live: Tensor, *, strict: bool) -> str:
    """Returns why values of `saved` cannot go into `live`, or an empty string; both may be on the meta device.

    Shapes must be equal. `strict` wants a dtype that holds every value: a wider one is fine.
    """
    if saved.shape != live.shape:
        return f"shape {tuple(saved.shape)} in the checkpoint, {tuple(live.shape)} in the model"
    if strict and _would_lose(saved.dtype, live.dtype):
        return f"{saved.dtype} in the checkpoint, {live.dtype} in the model; strict=False rounds the values"
    return ""


def refuse(path: object, problems: Iterable[str]) -> None:
    """Raises `CheckpointError` with the first ten problems, if there are any."""
    problems = list(problems)
    if problems:
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError(f"{path} does not fit:\n  " + "\n  ".join(problems[:10]) + more)


def _would_lose(saved: torch.dtype, live: torch.dtype) -> bool:
    if {saved, live} <= FLOAT_DTYPES or (saved.is_complex and live.is_complex):
        return torch.promote_types(saved, live) is not live
    return saved is not live
