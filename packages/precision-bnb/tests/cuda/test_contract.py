"""The contract, in every mode, on a GPU. Nobody has run these tests yet."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from precision_bnb import MODES, BitsandbytesPrecision
from precision_core.testing import PrecisionContract, needs

pytestmark = needs("cuda")


class TestNF4(PrecisionContract):
    accelerator = "gpu"
    settings: ClassVar[dict[str, Any]] = {"mode": "nf4"}

    def make_precision(self) -> BitsandbytesPrecision:
        return BitsandbytesPrecision(**self.settings)


class TestNF4DoubleQuantised(TestNF4):
    settings: ClassVar[dict[str, Any]] = {"mode": "nf4-dq", "dtype": torch.float32}


class TestFP4(TestNF4):
    settings: ClassVar[dict[str, Any]] = {"mode": "fp4", "dtype": torch.float16}


class TestFP4DoubleQuantised(TestNF4):
    settings: ClassVar[dict[str, Any]] = {"mode": "fp4-dq", "dtype": torch.bfloat16}


class TestInt8(TestNF4):
    settings: ClassVar[dict[str, Any]] = {"mode": "int8", "dtype": torch.float32}


class TestInt8Training(TestNF4):
    settings: ClassVar[dict[str, Any]] = {"mode": "int8-training"}


def test_every_mode_has_its_contract() -> None:
    classes = (TestNF4, TestNF4DoubleQuantised, TestFP4, TestFP4DoubleQuantised, TestInt8, TestInt8Training)
    assert {kit.settings["mode"] for kit in classes} == set(MODES)
