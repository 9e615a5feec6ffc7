"""The share of a model's weights that is quantised, and stacked experts, which are not."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from precision_bnb.convert import converted
from precision_bnb.layers import Quantized
from precision_core.precision import Item


def quantised_share(module: nn.Module) -> str:
    """Returns what the report says first: the share of a model's parameters that quantised layers hold as weights."""
    quantised = {
        layer.weight: layer.layout.rows * layer.layout.columns if isinstance(layer, Quantized) else layer.weight.numel()
        for _, layer in converted(module)
    }
    total = sum(quantised.get(param, param.numel()) for param in module.parameters())
    experts = sum(param.numel() for _, param, is_expert in _stacked(module) if is_expert)
    more = f" ({_percent(experts, total)} are experts, which stay as they are)" if experts else ""
    return f"{_percent(sum(quantised.values()), total)} of the weights quantised{more}"


def left_out(module: nn.Module) -> list[Item]:
    """Returns parameters of three dimensions, matrices that no layer holds: experts of a mixture mostly."""
    return [
        Item(
            name, f"{param.shape[0]} {'experts' if is_expert else 'matrices'} in one parameter, no layer: left as it is"
        )
        for name, param, is_expert in _stacked(module)
    ]


def _stacked(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    for prefix, owner in module.named_modules():
        if type(owner).__module__.startswith("torch."):
            continue  # the kernels of convolutions
        for key, param in owner._parameters.items():
            if param is not None and param.dim() == 3 and min(param.shape) > 1:
                name = f"{prefix}.{key}" if prefix else key
                yield name, param, "expert" in f"{name} {type(owner).__name__}".lower()


def _percent(part: int, of: int) -> str:
    if part in (0, of):
        return "100 %" if part else "0 %"
    return f"{min(99, max(1, round(100 * part / of)))} %"
