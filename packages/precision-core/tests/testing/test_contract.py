"""Core's plugins and the strategy for one device keep the contracts; broken ones do not."""

from __future__ import annotations

from precision_core import (
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


class TestBfloat16Mixed(PrecisionContract):
    def make_precision(self) -> Precision:
        return MixedPrecision("bf16-mixed", device="cpu")


class TestFloat16Mixed(PrecisionContract):
    def make_precision(self) -> Precision:
        return MixedPrecision("16-mixed", device="cpu")


class TestSingleDeviceStrategy(StrategyContract):
    def make_strategy(self) -> Strategy:
        return SingleDeviceStrategy("cpu")
