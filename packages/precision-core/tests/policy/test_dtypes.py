"""Dtype names: every spelling, and what is said to anything else."""

from __future__ import annotations

import numpy
import pytest
import torch

from precision_core.policy.dtypes import FLOAT_DTYPES, FLOATS, dtype_name, parse_dtype

SPELLINGS = {
    torch.float64: ("float64", "double", "fp64", "f64", "torch.float64", " float64 ", torch.float64, torch.double),
    torch.float32: ("float32", "float", "fp32", "f32", "torch.float", torch.float32, torch.float),
    torch.bfloat16: ("bfloat16", "bf16", "torch.bfloat16", torch.bfloat16),
    torch.float16: ("float16", "half", "fp16", "f16", "torch.half", torch.float16, torch.half),
}


@pytest.mark.parametrize("dtype", SPELLINGS)
def test_every_spelling_means_its_dtype(dtype: torch.dtype) -> None:
    assert [parse_dtype(spelling) for spelling in SPELLINGS[dtype]] == [dtype] * len(SPELLINGS[dtype])
    assert parse_dtype(dtype_name(dtype)) is dtype


def test_the_floats_are_four() -> None:
    assert FLOAT_DTYPES == set(FLOATS.values()) == set(SPELLINGS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "bfloat17",
            "unknown dtype 'bfloat17': allowed are float64, float32, bfloat16, float16; did you mean \"bfloat16\"",
        ),
        ("Float32", 'did you mean "float32"'),
        ("int8", "unknown dtype 'int8': allowed are"),
        ("", "unknown dtype ''"),
        (torch.int8, "unknown dtype torch.int8"),
        (torch.float8_e4m3fn, "unknown dtype torch.float8_e4m3fn"),
        (torch.complex64, "unknown dtype torch.complex64"),
        (16, "unknown dtype 16"),
        (None, "unknown dtype None"),
        (float, "unknown dtype <class 'float'>"),
        (numpy.dtype("float32"), "unknown dtype dtype('float32')"),
    ],
)
def test_anything_else_is_refused_with_what_is_allowed(given: object, message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_dtype(given)  # type: ignore[arg-type]
    assert message in str(error.value)
    assert "allowed are float64, float32, bfloat16, float16" in str(error.value)
