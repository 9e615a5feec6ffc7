"""Core's plugins and the strategy for one device keep the contracts; broken ones do not."""

from __future__ import annotations

import pytest
import torch

from precision_core import (
    MODES,
    DoublePrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
    SingleDeviceStrategy,
    Strategy,
)
from precision_core.testing import PrecisionContract, StrategyContract


class TestPrecision(PrecisionContract):
    def make_precision(self) -> Precision:
        return Precision()


class TestDoublePrecision(PrecisionContract):
    def make_precision(self) -> Precision:
        return DoublePrecision()


class TestBfloat16True(PrecisionContract):
    def make_precision(self) -> Precision:
        return HalfPrecision("bf16-true")


class TestFloat16True(PrecisionContract):
    def make_precision(self) -> Precision:
        return HalfPrecision("16-true")


class TestFloat16Master(PrecisionContract):
    def make_precision(self) -> Precision:
        return HalfPrecision("16-master")


class TestBfloat16Master(PrecisionContract):
    def make_precision(self) -> Precision:
        return HalfPrecision("bf16-master")


class TestBfloat16Stochastic(PrecisionContract):
    def make_precision(self) -> Precision:
        return HalfPrecision("bf16-stochastic")


@pytest.mark.full
@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch 2.10 brought grad_dtype")
class TestWideGradients(PrecisionContract):
    def make_precision(self) -> Precision:
        return HalfPrecision("params=bfloat16,master=float32,grads=float32")


class TestBfloat16Mixed(PrecisionContract):
    def make_precision(self) -> Precision:
        return MixedPrecision("bf16-mixed", device="cpu")


class TestFloat16Mixed(PrecisionContract):
    def make_precision(self) -> Precision:
        return MixedPrecision("16-mixed", device="cpu")


class TestSingleDeviceStrategy(StrategyContract):
    modes = tuple(  # the plugins above have theirs on one device too
        mode if mode in ("bf16-true", "16-mixed", "bf16-mixed") else pytest.param(mode, marks=pytest.mark.full)
        for mode in MODES
    )

    def make_strategy(self) -> Strategy:
        return SingleDeviceStrategy("cpu")
