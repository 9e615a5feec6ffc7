"""Settings: every spelling, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from precision_bnb import MODES, BitsAndBytesConfig, BitsandbytesPrecision


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_its_config_and_its_dict_are_the_same(mode: str) -> None:
    config = BitsAndBytesConfig.of(mode)
    assert config.mode == mode and BitsandbytesPrecision(mode).mode == mode
    assert BitsAndBytesConfig.of(config) is config
    again = BitsAndBytesConfig.of(config.to_dict())
    assert dataclasses.replace(again, bnb_4bit_compute_dtype=None) == config


@pytest.mark.parametrize("mode", MODES)
def test_there_and_back_through_transformers(mode: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(BitsandbytesPrecision(mode, torch.bfloat16).setup_bnb_config())
    theirs = transformers.BitsAndBytesConfig(**config.to_dict())
    assert theirs.quantization_method() == {"int8": "llm_int8"}.get(mode.partition("-")[0], mode.partition("-")[0])
    assert theirs.bnb_4bit_compute_dtype is torch.bfloat16
    back = BitsAndBytesConfig.of(theirs)
    assert back.mode == mode
    assert back == (config if back.load_in_4bit else dataclasses.replace(config, bnb_4bit_compute_dtype=None))


def test_what_transformers_cannot_say_is_not_lost_in_its_dict() -> None:
    config = dataclasses.replace(MODES["nf4"], block_size=128)
    with pytest.raises(ValueError, match=r"block_size=128\)\.to_dict\(\): transformers has blocks of 64 only"):
        config.to_dict()
    assert BitsAndBytesConfig.of(dataclasses.asdict(config)) == config


def test_everything_can_be_reached() -> None:
    given = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "float16",
        "bnb_4bit_quant_storage": "bfloat16",
        "block_size": 128,
        "llm_int8_skip_modules": ["head"],
    }
    config = BitsandbytesPrecision(given).setup_bnb_config()
    assert (config.block_size, config.bnb_4bit_quant_storage) == (128, torch.bfloat16)
    assert (config.bnb_4bit_compute_dtype, config.llm_int8_skip_modules) == (torch.float16, ("head",))
    assert BitsAndBytesConfig.of({"load_in_8bit": True, "llm_int8_threshold": 3.5}).llm_int8_threshold == 3.5
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.block_size = 64  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nf5", 'expected one of nf4, .*did you mean "nf4"'),
        ("nf4; *.norm: 32-true", "exceptions belong to what is not quantised"),
        (4, "expected one of nf4"),
        (BitsAndBytesConfig, "expected one of nf4"),
        ({}, "one of load_in_4bit and load_in_8bit is true, and neither is"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "both are"),
        ({"load_in_4bit": 1}, r"load_in_4bit=1\): expected True or False"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, '"nf4" or "fp4"'),
        ({"load_in_4bit": True, "block_size": 48}, r"block_size=48\): expected 32, 64"),
        ({"load_in_4bit": True, "block_size": 64.0}, r"block_size=64.0\): expected 32, 64"),
        ({"load_in_4bit": True, "llm_int8_skip_modules": ["a b"]}, "bad name pattern 'a b'"),
        ({"load_in_4bit": True, "llm_int8_skip_modules": [1]}, "bad name pattern 1"),
        ({"load_in_4bit": True, "blocksize": 64}, "unknown blocksize in the config"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "float64"}, "bnb_4bit_compute_dtype"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "half16"}, "unknown dtype"),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": torch.int8}, "bnb_4bit_quant_storage"),
        ({"load_in_8bit": True, "llm_int8_threshold": -1.0}, "a number from 0 on"),
        ({"load_in_8bit": True, "bnb_4bit_use_double_quant": True}, "is for 4 bits, and this is 8-bit"),
        ({"load_in_8bit": True, "block_size": 128}, "is for 4 bits"),
        ({"load_in_4bit": True, "llm_int8_has_fp16_weight": True}, "is for 8 bits, and this is 4-bit"),
        (
            {"load_in_8bit": True, "llm_int8_has_fp16_weight": True, "bnb_4bit_quant_storage": "bfloat16"},
            "nothing is stored quantised",
        ),
        ({"load_in_4bit": True, "fast_inference": True, "bnb_4bit_compute_dtype": "float32"}, "computes in bfloat16"),
        (
            {"load_in_4bit": True, "quant_method": "gptq"},
            "expected quant_method 'bitsandbytes' in the config, got 'gptq'",
        ),
    ],
)
def test_what_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BitsandbytesPrecision(given)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.complex64, "bfloat16"])
def test_dtypes_that_nothing_computes_in_are_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"layers compute in one of torch.float32"):
        BitsandbytesPrecision("nf4", dtype)


def test_transformers_object_and_its_dict_agree() -> None:
    theirs = pytest.importorskip("transformers").BitsAndBytesConfig(load_in_8bit=True)
    for given in (theirs, theirs.to_dict(), theirs.to_diff_dict()):
        assert BitsAndBytesConfig.of(given) == MODES["int8"]
