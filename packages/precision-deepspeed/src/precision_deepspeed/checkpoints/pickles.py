"""DeepSpeed's checkpoint files, opened without executing anything: they are plain pickles."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from precision_core.checkpoint import CheckpointError


def check_pickles(paths: Iterable[Path]) -> None:
    """Reads each file with torch's restricted unpickler (`weights_only=True`), before DeepSpeed unpickles it.

    Raises:
        CheckpointError: a file has objects other than tensors and four of DeepSpeed's own classes, or is damaged.
    """
    for path in paths:
        open_pickle(path)


def open_pickle(path: Path, *, trust: bool = False) -> Any:
    """Returns a file's content, with tensors mapped to memory; `trust` opens any pickle, which may execute code.

    Raises:
        CheckpointError: as `check_pickles` does.
    """
    try:
        with _deepspeeds_classes():
            return torch.load(path, map_location="cpu", weights_only=not trust, mmap=True)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "damaged" in line]
        reason = (lines or [f"{type(error).__name__}: {str(error)[:200]}"])[0]
        raise CheckpointError(
            f"{path} has other objects in it than DeepSpeed's checkpoints have, and was not opened: {reason[:300]}. If "
            "you trust its source: fabric.load(..., trust=True)"
        ) from error


def _deepspeeds_classes() -> AbstractContextManager[Any]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    context: AbstractContextManager[Any] = torch.serialization.safe_globals(
        [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    )
    return context
