"""What peft puts into a model: the parts that stay as they are, and which way round it takes a layer's weight to be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from precision_bnb.layers import QuantizedLinear
from precision_core.policy import covers

ADAPTERS = ("lora_A", "lora_B", "modules_to_save", "prompt_encoder")
"""Modules that always stay as they are: peft's, which train."""


def trains_in_peft(module: nn.Module) -> Iterator[str]:
    """Yields the linear layers that train in a model which peft has frozen: they are its own, by whatever name."""
    if not any(hasattr(child, "peft_config") for child in module.modules()):
        return
    linears = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and not isinstance(layer, QuantizedLinear)
    }
    trains = [name for name, layer in linears.items() if layer.weight.requires_grad]
    if len(trains) < len(linears):
        yield from (name for name in trains if not any(covers(pattern, name) for pattern in ADAPTERS))


def tell_peft_of_conv1d(module: nn.Module, conv1d: type[nn.Module] | None) -> None:
    """Sets peft's `fan_in_fan_out`, whether a weight is (columns, rows), around layers that are or were Conv1D.

    Packed weights are (rows, columns), floats of Conv1D are not. peft looks once, when it wraps a layer; a square
    weight would later be merged the wrong way round without an error.
    """
    for wrapper in module.modules():
        base: Any = getattr(wrapper, "base_layer", None)
        while hasattr(base, "base_layer"):  # adapters around adapters
            base = base.base_layer
        is_conv1d = conv1d is not None and isinstance(base, conv1d)
        if not (is_conv1d or getattr(base, "transposed", False)):
            continue
        parts: Any = wrapper.modules()  # DoRA's part has its own
        for part in parts:
            if hasattr(part, "fan_in_fan_out"):
                part.fan_in_fan_out = not isinstance(base, QuantizedLinear)
