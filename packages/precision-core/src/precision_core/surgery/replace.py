"""Layer surgery: replaces layers of given types, and keeps everything else about the model.

What is replaced is decided in full before anything changes (`layers`, `plan`). Then each layer is swapped as soon as
its replacement is made, so that its old weights can be freed before the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from precision_core.precision.model.remap import ParamMap, ParamRef, named_params, replaced_params
from precision_core.precision.model.report import Item, Report, module_bytes
from precision_core.surgery.hooks import move_hooks
from precision_core.surgery.layers import Layer, Replacement, find_layers, shown
from precision_core.surgery.plan import Plan, make_plan

__all__ = ["Replacement", "Surgery", "replace_layers"]


@dataclass(frozen=True)
class Surgery:
    """What `replace_layers` did, or with `dry_run` would do.

    `module` is the root, or the new layer if the root itself was replaced; `report` lists layers and bytes; `params`
    maps old to new parameters (the old ones are held weakly), to remap optimizers made before.
    """

    module: nn.Module
    report: Report
    params: ParamMap


def replace_layers(
    root: nn.Module,
    replacements: Mapping[type[nn.Module], Replacement],
    *,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    mode: str = "",
    dry_run: bool = False,
) -> Surgery:
    """Replaces, in place, the layers whose exact type is a key of `replacements`.

    `include` and `exclude` are patterns of module names; None includes all, and exclude wins. New layers keep the old
    ones' training flag, `requires_grad`, hooks, attributes, and ties to other layers. Skipped layers are in the report
    with the reason; `mode` is the report's. With `dry_run` nothing changes.

    Raises:
        ValueError: before anything is changed: a pattern that matches no module, or layers that would lose something,
            such as a parametrisation. Later: a new layer without a parameter or buffer of the old one, or whose
            parameter cannot replace a tied one.
        TypeError: `make` did not return a module.
        RuntimeError: `make` raised; says how many layers were converted before.
    """
    top = nn.Module()
    top._modules[""] = root  # so that the root, too, is replaced in its parent
    before, bytes_before = named_params(root), module_bytes(root)
    plan = make_plan(root, find_layers(root, top, replacements, include, exclude))
    notes = _fast_path_notes(plan)
    if dry_run:
        converted = [Item(shown(layer.name), type(layer.module).__name__) for layer in plan.layers]
    else:
        converted = _convert(plan)
    module = top._modules[""]
    assert module is not None
    report = Report(mode, tuple(converted), plan.skipped, notes, bytes_before, module_bytes(module))
    return Surgery(module, report, replaced_params(before, module))


def _fast_path_notes(plan: Plan) -> tuple[str, ...]:
    names = ", ".join(shown(name) for name, _, _ in plan.fast_paths)
    note = f"torch's fast path for inference is off in {names}: it reads weights without calling the new layers"
    return (note,) if names else ()


def _convert(plan: Plan) -> list[Item]:
    for _, module, gate in plan.fast_paths:
        setattr(module, gate, type(getattr(module, gate))(False))  # 0 or False, as torch has it
    converted: list[Item] = []
    successors: ParamMap = WeakIdKeyDictionary()  # old parameter -> the one in use instead, perhaps itself
    while plan.layers:
        converted.append(_swap(plan.layers.popleft(), plan, successors, len(converted)))
    return converted


def _swap(layer: Layer, plan: Plan, successors: ParamMap, done: int) -> Item:
    """Puts a new layer at all positions of `layer`; only locals of this function still refer to the old one."""
    old = layer.module
    before = named_params(old)  # weak, so that `make` can free each weight as soon as it has read it
    flags = {key: (param.requires_grad, param.shape, param.dtype) for key, param in _params(old).items()}
    buffers = [key for key, _ in old.named_buffers(remove_duplicate=False)]
    new = _make(layer, done)
    present = {*_params(new), *(key for key, _ in new.named_buffers(remove_duplicate=False))}
    dropped = [key for key in (*before, *buffers) if key not in present]
    if dropped:
        raise ValueError(f"{shown(layer.name)}: the new {type(new).__name__} has no {', '.join(dropped)}")
    for key, param in _params(new).items():
        if key in flags:
            _keep_flags(before[key](), param, *flags[key], packs=layer.replacement.packs)
    _tie(layer, new, before, plan, successors)
    if new is not old:
        try:
            _keep(old, new)
        except ValueError as error:
            raise ValueError(f"{shown(layer.name)}: {error}") from error
    for position in layer.positions:
        position.parents[-1]._modules[position.key] = new
    return Item(shown(layer.name), f"{type(old).__name__} -> {type(new).__name__}")


def _make(layer: Layer, done: int) -> nn.Module:
    name = shown(layer.name)
    try:
        new: Any = layer.replacement.make(layer.module)
    except Exception as error:
        raise RuntimeError(f"{name} could not be converted (layers converted before it: {done}): {error}") from error
    if not isinstance(new, nn.Module):
        raise TypeError(f"{name}: make returned a {type(new).__name__}, not a module")
    return new


def _params(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(remove_duplicate=False))


def _keep_flags(
    old: Tensor | None, new: nn.Parameter, trainable: bool, shape: torch.Size, dtype: torch.dtype, *, packs: bool
) -> None:
    packed = packs and (new.shape, new.dtype) != (shape, dtype)  # floating ones, too: bytes stored as bfloat16
    if not trainable or (not packed and (new.is_floating_point() or new.is_complex())):
        new.requires_grad_(trainable)
    if old is not None and old is not new:
        for key, value in vars(old).items():
            if not hasattr(new, key):
                setattr(new, key, value)  # attributes that users and sharding libraries set


def _tie(layer: Layer, new: nn.Module, before: Mapping[str, ParamRef], plan: Plan, successors: ParamMap) -> None:
    """Replaces a tied parameter everywhere by that of the first new layer which holds it."""
    moves = []
    params = _params(new)
    for key, reference in before.items():
        old, param = reference(), params.get(key)
        if old is None or param is None:
            continue
        first = successors.setdefault(old, param)
        if first is not param:
            owner, _, last = key.rpartition(".")
            spots, like = [(new.get_submodule(owner), last)], param
        else:
            spots, like = plan.slots.get(old, []), old
        if spots and (type(first), first.shape, first.dtype) != (type(like), like.shape, like.dtype):
            raise ValueError(
                f"{shown(layer.name)}: its {key} is tied, and the new one cannot replace it elsewhere: "
                f"it is a {_kind(first)}, a {_kind(like)} is needed (packs=True skips tied layers)"
            )
        moves += [(module, name, first) for module, name in spots]
    for module, name, param in moves:
        module._parameters[name] = param


def _kind(param: Tensor) -> str:
    return f"{type(param).__name__} of {str(param.dtype).removeprefix('torch.')} and shape {tuple(param.shape)}"


def _keep(old: nn.Module, new: nn.Module) -> None:
    new.train(old.training)
    for key, value in vars(old).items():
        if not hasattr(new, key):
            is_own = isinstance(value, MethodType) and value.__self__ is old
            vars(new)[key] = MethodType(value.__func__, new) if is_own else value
    move_hooks(old, new)
