"""The contracts on a GPU: every plugin, 16-mixed also where no step waits for the device, and DDP with one rank."""

from __future__ import annotations

from typing import ClassVar

import pytest
from torch import nn
from torch.optim import AdamW, Optimizer

from precision_core import (
    MODES,
    DDPStrategy,
    DoublePrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
    SingleDeviceStrategy,
    Strategy,
)
from precision_core.testing import PrecisionContract, StrategyContract, needs

pytestmark = needs("cuda")


class TestPrecision(PrecisionContract):
    accelerator = "gpu"

    def make_precision(self) -> Precision:
        return Precision()


class TestDoublePrecision(PrecisionContract):
    accelerator = "gpu"

    def make_precision(self) -> Precision:
        return DoublePrecision()


class TestBfloat16True(PrecisionContract):
    accelerator = "gpu"

    def make_precision(self) -> Precision:
        return HalfPrecision("bf16-true")


class TestFloat16True(PrecisionContract):
    accelerator = "gpu"

    def make_precision(self) -> Precision:
        return HalfPrecision("16-true")


class TestFloat16Master(PrecisionContract):
    """With SGD, which waits for the flag of inf and NaN in each step."""

    accelerator = "gpu"

    def make_precision(self) -> Precision:
        return HalfPrecision("16-master")


class TestFloat16MasterFused(TestFloat16Master):
    """Where the optimizer skips on the device, piece by piece."""

    learning_rate = 0.003  # of AdamW

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        return AdamW(model.parameters(), lr=self.learning_rate, fused=True)


class TestBfloat16Mixed(PrecisionContract):
    accelerator = "gpu"

    def make_precision(self) -> Precision:
        return MixedPrecision("bf16-mixed", device="cuda")


class TestFloat16Mixed(PrecisionContract):
    """With SGD, which waits for the flag of inf and NaN in each step."""

    accelerator = "gpu"

    def make_precision(self) -> Precision:
        return MixedPrecision("16-mixed", device="cuda")


class TestFloat16MixedForeach(TestFloat16Mixed):
    learning_rate = 0.003  # of AdamW
    options: ClassVar[dict[str, bool]] = {"foreach": True}

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        return AdamW(model.parameters(), lr=self.learning_rate, **self.options)


class TestFloat16MixedFused(TestFloat16MixedForeach):
    """Where the optimizer skips on the device, and the host reads the flags a hundred steps later."""

    options: ClassVar[dict[str, bool]] = {"fused": True}


class TestSingleDeviceStrategy(StrategyContract):
    accelerator = "cuda"  # of one device the strategy takes a device's name
    modes = tuple(MODES)

    def make_strategy(self) -> Strategy:
        return SingleDeviceStrategy("cuda")


@pytest.mark.usefixtures("alone")
class TestDDPStrategy(StrategyContract):
    """One rank on NCCL, which takes one rank a GPU."""

    accelerator = "cuda"
    modes = tuple(MODES)

    def make_strategy(self) -> Strategy:
        return DDPStrategy()
