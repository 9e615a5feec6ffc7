"""Weights that the vendor stores quantised alone: they look like floats, and no cast may reach them."""

from __future__ import annotations

from torch import nn


def is_quantized(param: nn.Parameter) -> bool:
    """Whether `param` is one of the vendor's quantised tensors, whatever dtype it shows."""
    return type(param).__module__.startswith("transformer_engine.")
