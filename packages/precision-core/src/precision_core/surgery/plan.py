"""The plan of layer surgery, made in full before anything changes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils.weak import WeakIdKeyDictionary

from precision_core.precision.model.report import Item
from precision_core.surgery.layers import Layer, shown

_SHOWN = 10
_OLD_STYLE = {  # a forward pre-hook of that class -> what takes it off
    WeightNorm: "torch.nn.utils.remove_weight_norm",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm",
    BasePruningMethod: "torch.nn.utils.prune.remove",
}


@dataclass(frozen=True)
class Plan:
    """`layers` to replace, in definition order, to be popped one by one: nothing else here holds an old layer."""

    layers: deque[Layer]
    skipped: tuple[Item, ...]
    slots: WeakIdKeyDictionary  # parameter -> [(module, key)]: its positions outside of these layers
    fast_paths: list[tuple[str, nn.Module, str]]  # name, module and the attribute that gates its fast path


def make_plan(root: nn.Module, layers: list[Layer]) -> Plan:
    """Returns the plan for `layers`; raises `ValueError` for those that would lose something."""
    slots = _untie(root, layers)
    _check_losses(layers)
    planned = {layer.module for layer in layers if layer.converts}
    return Plan(
        deque(layer for layer in layers if layer.converts),
        tuple(Item(shown(layer.name), layer.reason) for layer in layers if layer.reason is not None),
        slots,
        list(_fast_paths(root, planned)),
    )


# -------------------------------------------------------------------- tied parameters


class _Slot(NamedTuple):
    name: str
    module: nn.Module
    key: str
    layer: Layer | None


def _untie(root: nn.Module, layers: list[Layer]) -> WeakIdKeyDictionary:
    """Skips layers that pack a parameter which is needed unpacked elsewhere; returns `Plan.slots`."""
    owner = {module: layer for layer in layers if layer.converts for module in layer.module.modules()}
    holders: dict[nn.Parameter, list[_Slot]] = {}
    for name, module in root.named_modules():
        for key, param in module._parameters.items():
            if param is not None:
                holders.setdefault(param, []).append(_Slot(name, module, key, owner.get(module)))
    tied = {param: slots for param, slots in holders.items() if len(slots) > 1}
    while any(_leave_one_alone(slots) for slots in tied.values()):
        pass  # a skipped layer needs its other parameters unpacked, too
    elsewhere = WeakIdKeyDictionary()
    for param, slots in tied.items():
        elsewhere[param] = [(slot.module, slot.key) for slot in slots if slot.layer is None or not slot.layer.converts]
    return elsewhere


def _leave_one_alone(slots: list[_Slot]) -> bool:
    for slot in slots:
        layer = slot.layer
        if layer is None or not layer.converts or not layer.replacement.packs:
            continue
        for other in slots:
            if other.layer is layer:
                continue
            if other.layer is None or not other.layer.converts:
                what = "not converted"
            elif other.layer.replacement is not layer.replacement or other.key != slot.key:
                what = "converted in another way"
            else:
                continue
            layer.reason = f"its {slot.key} is tied to {shown(other.name)}, which is {what}"
            return True
    return False


# -------------------------------------------------------------------- what would be lost


def _check_losses(layers: list[Layer]) -> None:
    losses = {layer.name: loss for layer in layers if layer.converts and (loss := _loss(layer))}
    if not losses:
        return
    names = [name for name in losses if name][:_SHOWN]
    lines = [f"  {shown(name)}: {loss}" for name, loss in list(losses.items())[:_SHOWN]]
    more = [f"  ... and {len(losses) - _SHOWN} more"] if len(losses) > _SHOWN else []
    way_out = f"remove that, or skip the layers with exclude={names!r}" if names else "remove that"
    raise ValueError("\n".join(["converting these layers would lose something:", *lines, *more, way_out]))


def _loss(layer: Layer) -> str | None:
    module = layer.module
    if parametrize.is_parametrized(module):
        names = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        return f"a parametrisation of {names} (torch.nn.utils.parametrize.remove_parametrizations)"
    for hook in module._forward_pre_hooks.values():
        for kind, remover in _OLD_STYLE.items():
            if isinstance(hook, kind):
                return f"a parametrisation, {type(hook).__name__} ({remover})"
    for name, param in module.named_parameters():
        if layer.replacement.keeps(module, param):
            continue
        if param._backward_hooks or param._post_accumulate_grad_hooks:
            return f"a hook on the gradient of {name}"
        if param.grad is not None:
            return f"a gradient of {name} (zero_grad)"
    tables: tuple[Mapping[str, torch.Tensor | nn.Module | None], ...] = (
        module._parameters,
        module._buffers,
        module._modules,
    )
    takes = layer.replacement.takes
    own = [name for table in tables for name, value in table.items() if value is not None and name not in takes]
    return f"{', '.join(own)}, which {type(module).__name__} layers do not have" if own else None


# -------------------------------------------------------------------- torch's fast paths


def _fast_paths(root: nn.Module, planned: set[nn.Module]) -> Iterator[tuple[str, nn.Module, str]]:
    """Yields the modules whose forward, in inference, reads the weights of what is replaced in them."""
    for name, module in root.named_modules():
        if module in planned:
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            inner, gate = module.modules(), "activation_relu_or_gelu"
        elif isinstance(module, nn.TransformerEncoder):
            # Its padding becomes nested tensors, which only its layers' fast path takes.
            inner, gate = module.layers.modules(), "use_nested_tensor"
        else:
            continue
        if getattr(module, gate, False) and any(child in planned for child in inner):
            yield name, module, gate
