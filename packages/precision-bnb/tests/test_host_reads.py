"""The host reads no value of a tensor in a step over quantised layers, and in evaluation what bitsandbytes asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from precision_bnb import BitsAndBytesConfig, BitsandbytesPrecision
from precision_core import Fabric
from precision_core.testing import HostReads, reads_of_ten_steps, run_in_ranks, small_model

MODES = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training")
CLIP = {"max_norm": 1.0}


def reads(mode: str, dtype: torch.dtype, strategy: str, **options: Any) -> dict[str, int]:
    """Returns where ten steps read: the linear layers are quantised, norms train, and in int8-training all does."""
    precision = BitsandbytesPrecision(mode, dtype, ignore_modules=set())
    return dict(reads_of_ten_steps(Fabric("cpu", strategy, devices=1, precision=precision), **options))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_ten_steps_read_nothing(mode: str, dtype: torch.dtype) -> None:
    assert reads(mode, dtype, "auto", clip=CLIP) == {}


def in_ddp() -> dict[str, dict[str, int]]:
    return {mode: reads(mode, torch.bfloat16, "ddp", clip=CLIP) for mode in MODES}


def test_ten_steps_under_ddp_read_nothing() -> None:
    assert run_in_ranks(1, in_ddp) == [{mode: {} for mode in MODES}]


def test_float16_that_trains_reads_as_16_mixed_does() -> None:
    assert sum(reads("nf4", torch.float16, "auto", fused=False).values()) == 10
    assert sum(reads("nf4", torch.float16, "auto", skipped=True).values()) == 10


class Asks(TorchDispatchMode):
    """Counts calls of the operator that asks its device whether there are outliers, where it is given a threshold: in
    bitsandbytes' kernels for CUDA and for CPUs alike, and nobody sees inside of an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "bitsandbytes::int8_vectorwise_quant":
            _, threshold = (*args, *(kwargs or {}).values(), 0.0)[:2]
            self.count += threshold > 0.0
        return func(*args, **(kwargs or {}))


EVALUATION: dict[tuple[str, float], int] = {("int8", 6.0): 20, ("int8", 0.0): 0, ("nf4", 6.0): 0}
"""Mode and threshold for outliers -> reads in ten forwards of two layers."""


@pytest.mark.parametrize(("mode", "threshold"), EVALUATION)
def test_ten_forwards_read_what_the_table_says(mode: str, threshold: float) -> None:
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold) if mode == "int8" else mode
    precision = BitsandbytesPrecision(config, torch.bfloat16, ignore_modules=set())
    fabric = Fabric("cpu", precision=precision)
    model: nn.Module = fabric.setup(small_model()).eval()
    x = torch.randn(16, 64)
    with torch.no_grad():
        model(x)
        with Asks() as asks, HostReads() as counted:
            for _ in range(10):
                model(x)
    assert (counted.lines, asks.count) == ([], EVALUATION[mode, threshold])


def test_training_asks_for_no_outliers() -> None:
    with Asks() as asks:
        reads("int8", torch.bfloat16, "auto"), reads("int8-training", torch.bfloat16, "auto")
    assert asks.count == 0
