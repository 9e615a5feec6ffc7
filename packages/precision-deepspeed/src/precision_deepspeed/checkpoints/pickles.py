"""DeepSpeed's checkpoint files, opened without executing anything: they are plain pickles."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from precision_core.checkpoint import CheckpointError


def check_pickles(paths: Iterable[Path]) -> None:
    """Reads each file with torch's machine that executes nothing, before DeepSpeed opens it with plain pickle.

    Raises:
        CheckpointError: a file asks for more than tensors and four of DeepSpeed's own classes, or is damaged.
    """
    for path in paths:
        open_pickle(path)


def open_pickle(path: Path, *, trust: bool = False) -> Any:
    """Returns what a file holds, its tensors mapped; with `trust` it may hold anything, and execute it.

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
            f"{path} has more in it than a checkpoint of DeepSpeed's, and was not opened: {reason[:300]}. If "
            "you know who wrote it: fabric.load(..., trust=True)"
        ) from error


def _deepspeeds_classes() -> AbstractContextManager[Any]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    context: AbstractContextManager[Any] = torch.serialization.safe_globals(
        [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    )
    return context
