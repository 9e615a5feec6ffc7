"""The floating dtypes a policy may name: parsing and printing."""

from __future__ import annotations

import torch

from precision_core.policy.messages import nearest

FLOATS: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_SHORT = {
    "double": "float64",
    "fp64": "float64",
    "f64": "float64",
    "float": "float32",
    "fp32": "float32",
    "f32": "float32",
    "bf16": "bfloat16",
    "half": "float16",
    "fp16": "float16",
    "f16": "float16",
}

FLOAT_DTYPES: frozenset[torch.dtype] = frozenset(FLOATS.values())
"""What casts are allowed to touch: integers, bool, float8 and quantised dtypes are not in it."""

HALF_DTYPES = (torch.float16, torch.bfloat16)
"""Those of 16 bits."""


def parse_dtype(value: str | torch.dtype) -> torch.dtype:
    """Returns the floating dtype that `value` names (`torch.bfloat16`, `"bfloat16"`, `"bf16"`, ...).

    Raises:
        ValueError: for anything that is not one of float64, float32, bfloat16, float16.
    """
    if isinstance(value, torch.dtype) and value in FLOAT_DTYPES:
        return value
    name = str(value).strip().removeprefix("torch.")
    name = _SHORT.get(name, name)
    if name in FLOATS and isinstance(value, str):
        return FLOATS[name]
    raise ValueError(f"unknown dtype {value!r}: allowed are {', '.join(FLOATS)}{nearest(name, FLOATS)}")


def dtype_name(dtype: torch.dtype) -> str:
    """Returns `"bfloat16"` for `torch.bfloat16`: of a floating dtype, what `parse_dtype` reads back."""
    return str(dtype).removeprefix("torch.")
