"""What a compiled program computes in: matrix products counted by dtype, from its HLO text."""

from __future__ import annotations

import re
from collections import Counter

import torch

_DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
_PRODUCT = re.compile(r"= (\w+)\[[^=]*? (?:dot|convolution)\((\w+)\[.*?, (\w+)\[")


def matrix_products(hlo: str) -> Counter[torch.dtype]:
    """Returns how many matrix products and convolutions of each dtype are in a program.

    A product counts by its operands' dtype; one of two dtypes, or with a result in another, is a `ValueError`, as no
    mode has any.
    """
    found: Counter[torch.dtype] = Counter()
    for line in hlo.splitlines():
        match = _PRODUCT.search(line)
        if match is not None:
            kinds = set(match.groups())
            if len(kinds) > 1:
                raise ValueError(f"a product of several dtypes: {line.strip()}")
            found[_DTYPES[kinds.pop()]] += 1
    return found
