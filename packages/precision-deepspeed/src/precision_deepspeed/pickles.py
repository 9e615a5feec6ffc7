"""The scan of DeepSpeed's checkpoint files before DeepSpeed opens them: it loads them with plain pickle."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from precision_core.checkpoint import CheckpointError


def check_pickles(paths: Iterable[Path]) -> None:
    """Reads each file with torch's machine that executes nothing, and with four of DeepSpeed's own classes.

    Raises:
        CheckpointError: a file asks for anything else, or is damaged; names both.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
        for path in paths:
            try:
                torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:
                lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "damaged" in line]
                reason = (lines or [f"{type(error).__name__}: {str(error)[:200]}"])[0]
                raise CheckpointError(
                    f"{path} has more in it than a checkpoint of DeepSpeed's, and was not opened: {reason[:300]}. If "
                    "you know who wrote it: fabric.load(..., trust=True)"
                ) from error
