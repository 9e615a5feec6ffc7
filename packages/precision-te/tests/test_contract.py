"""The contract, in every mode of the reference: the same loops, states and conversions as any plugin's."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from precision_core import Fabric
from precision_core.testing import PrecisionContract, checks_loop
from precision_te import MODES, TransformerEnginePrecision
from precision_te.plugin import from_mode


class TestDelayed(PrecisionContract):
    mode: ClassVar[str] = "fp8-reference"
    settings: ClassVar[dict[str, Any]] = {}

    def make_precision(self) -> TransformerEnginePrecision:
        return from_mode(self.mode, **self.settings)


@pytest.mark.full
class TestCurrent(TestDelayed):
    mode = "fp8-current-reference"


@pytest.mark.full
class TestMXFP8(TestDelayed):
    mode = "mxfp8-reference"


@pytest.mark.full
class TestBlock(TestDelayed):
    settings: ClassVar[dict[str, Any]] = {"recipe": "block"}


class TestNVFP4(TestDelayed):
    mode = "nvfp4-reference"

    def make_fabric(self) -> Fabric:
        torch.manual_seed(0)  # gradients are rounded stochastically: runs that are to be equal begin alike
        return super().make_fabric()

    @pytest.mark.xfail(reason="in FP4 the halves of a batch lie 0.18 from the whole; the bound is bfloat16's, 0.15")
    def test_accumulation_adds_up(self) -> None:
        super().test_accumulation_adds_up()


class TestFloat16(PrecisionContract):
    base: ClassVar[str] = "16-mixed"

    def make_precision(self) -> TransformerEnginePrecision:
        return TransformerEnginePrecision(self.base, engine="reference")

    @pytest.mark.xfail(
        reason="in E5M2 the halves of a batch lie 0.04 from the whole; the bound is that of the base mode"
    )
    def test_accumulation_adds_up(self) -> None:
        super().test_accumulation_adds_up()


@pytest.mark.full
class TestTrueFloat32(TestFloat16):
    base = "32-true"


class TestTrueBfloat16(PrecisionContract):
    def make_precision(self) -> TransformerEnginePrecision:
        return TransformerEnginePrecision("bf16-true", engine="reference")


@pytest.mark.parametrize(("kind", "bound"), [(TestNVFP4, 0.25), (TestFloat16, 0.06), (TestTrueFloat32, 0.06)])
def test_accumulation_adds_up_within_the_formats_error(kind: type[PrecisionContract], bound: float) -> None:
    kit = type("Kit", (kind,), {"tolerance": bound})()
    checks_loop.accumulation_adds_up(kit)


def test_every_mode_of_the_reference_has_its_contract() -> None:
    kits = (TestDelayed, TestCurrent, TestMXFP8, TestNVFP4)
    assert {kit.mode for kit in kits} == {mode for mode in MODES if mode != "transformer-engine"}
