"""Weights that the vendor stores quantised alone: they look like floats, and no cast may reach them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def is_quantized(param: nn.Parameter) -> bool:
    """Whether `param` is one of the vendor's quantised tensors, whatever dtype it shows."""
    return type(param).__module__.startswith("transformer_engine.")


@contextmanager
def hidden(module: nn.Module) -> Iterator[None]:
    """Context in which quantised weights are no parameters, so that no cast reaches them; the order stays."""
    weights = [
        (layer, name, param)
        for layer in module.modules()
        for name, param in layer._parameters.items()
        if param is not None and is_quantized(param)
    ]
    for layer, name, _ in weights:
        layer._parameters[name] = None
    try:
        yield
    finally:
        for layer, name, param in weights:
            layer._parameters[name] = param
