"""The contract, in every mode; and the parts of it that a packed weight changes."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from precision_bnb import MODES, BitsAndBytesConfig, BitsandbytesPrecision
from precision_core.testing import PrecisionContract


class TestNF4(PrecisionContract):
    settings: ClassVar[dict[str, Any]] = {"mode": "nf4"}

    def make_precision(self) -> BitsandbytesPrecision:
        return BitsandbytesPrecision(**self.settings)


@pytest.mark.full
class TestNF4DoubleQuantised(TestNF4):
    settings: ClassVar[dict[str, Any]] = {"mode": "nf4-dq", "dtype": torch.float32}


@pytest.mark.full
class TestFP4(TestNF4):
    settings: ClassVar[dict[str, Any]] = {"mode": "fp4", "dtype": torch.float32}


class TestFP4DoubleQuantised(TestNF4):
    settings: ClassVar[dict[str, Any]] = {"mode": "fp4-dq", "dtype": torch.bfloat16, "base": "bf16-mixed"}


class TestInt8(TestNF4):
    settings: ClassVar[dict[str, Any]] = {"mode": "int8", "dtype": torch.float32}


class TestInt8Training(TestNF4):
    settings: ClassVar[dict[str, Any]] = {"mode": "int8-training"}


class TestFloat16(TestNF4):
    settings: ClassVar[dict[str, Any]] = {"mode": "nf4", "dtype": torch.float16}


class TestBfloat16(TestNF4):
    settings: ClassVar[dict[str, Any]] = {"mode": "nf4", "dtype": torch.bfloat16}


class TestStoredAsBfloat16(TestNF4):
    config: ClassVar[dict[str, Any]] = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": "bfloat16",
    }
    settings: ClassVar[dict[str, Any]] = {"mode": BitsAndBytesConfig.of(config), "dtype": torch.float32}

    @pytest.mark.xfail(reason="some bytes are NaN as bfloat16, which equals nothing; test_state compares bit for bit")
    def test_copies_of_a_model_are_complete(self) -> None:
        super().test_copies_of_a_model_are_complete()


def test_every_mode_has_its_contract() -> None:
    classes = (TestNF4, TestNF4DoubleQuantised, TestFP4, TestFP4DoubleQuantised, TestInt8, TestInt8Training)
    assert {kit.settings["mode"] for kit in classes} == set(MODES)
