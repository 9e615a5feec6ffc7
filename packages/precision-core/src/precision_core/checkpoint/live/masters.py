"""Masters: brings a checkpoint's weights, and what an optimizer keeps beside them, to what the live model stores.

A `bf16-master` run saves bfloat16 weights in the model, and in the optimizer's state the rest of their float32 values;
a `16-master` run saves float16 weights, and the full values. From float32 weights both can be made exactly, from either
of them the other and float32 weights. Half weights alone cannot hold what is beside them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from precision_core.checkpoint.live.alignment import replaced
from precision_core.checkpoint.live.optimizer_names import param_names
from precision_core.checkpoint.live.state import plain_name, stateful_objects
from precision_core.checkpoint.tree import KeyPath
from precision_core.policy.messages import listed
from precision_core.precision.masters import KEYS, MASTER, REST, Masters, combined
from precision_core.precision.update.layout import local

Name = tuple[KeyPath, str]

_LOSSES = {
    REST: "the other 16 bits of the float32 master weights of {}, which are bfloat16 here",
    MASTER: "the float32 master weights of {}, which are float16 here",
}


class Translated(NamedTuple):
    """The content as the live objects store it."""

    content: dict[str, Any]
    beside: list[tuple[nn.Parameter, Tensor]]
    """What to keep beside parameters once the content is loaded."""
    dropped: dict[str, list[str]]
    """One of `KEYS` -> parameters that cannot hold what was saved beside them."""
    beyond: list[str]
    """Parameters whose weights would be infinite here; found with `values`."""

    @property
    def loss(self) -> str:
        """What the live objects cannot hold, in words; empty: they hold all."""
        return "; ".join(_LOSSES[key].format(listed(names, 5)) for key, names in self.dropped.items())


class _Beside(NamedTuple):
    """What the content has beside a weight: where, its names, and the live parameter that it is for, if any."""

    path: KeyPath
    value: Tensor
    names: list[Name]
    owner: nn.Parameter | None
    is_loaded: bool
    """Whether an optimizer of the tree takes it."""

    @property
    def key(self) -> str:
        return str(self.path[-1])


def translated(
    tree: dict[str, Any], content: dict[str, Any], header: dict[str, Any], masters: Masters, *, values: bool
) -> Translated:
    """Returns `content`, aligned to `tree`, with weights and what is beside them as the objects in `tree` store them.

    Without `values`, tensors that change are on the meta device, of the right dtype: enough to compare.
    """
    params = dict(_live_params(tree))
    changed: dict[KeyPath, Any] = {}
    beside: dict[int, tuple[nn.Parameter, Tensor]] = {}
    dropped: dict[str, list[str]] = {}
    full: dict[KeyPath, Tensor] = {}
    beyond: list[str] = []
    for each in list(_besides(tree, content, header, params)):
        if each.owner is None:
            continue
        if masters.holds(each.owner) and masters.key == each.key:
            if not each.is_loaded and not each.value.is_meta:
                beside[id(each.owner)] = (each.owner, each.value)
            continue
        changed[each.path] = None
        weights = [(*path, name) for path, name in each.names if _at(content, (*path, name)) is not None]
        if each.owner.dtype is KEYS[each.key] or not weights:
            name = each.names[0][1] if each.names else f"a parameter of shape {tuple(each.value.shape)}"
            dropped.setdefault(each.key, []).append(name)
            continue
        for key_path in weights:
            weight = _at(content, key_path)
            if isinstance(weight, Tensor) and weight.dtype is KEYS[each.key]:
                full[key_path] = combined(weight, each.value) if values else _meta(weight)
    changed.update(full)
    for (path, name), live in params.items():
        weight = full.get((*path, name), _at(content, (*path, name)))
        if isinstance(weight, Tensor) and weight.dtype in masters.exact and masters.holds(live):
            half, new = masters.split(weight if values else _meta(weight))
            changed[(*path, name)] = half
            beside[id(live)] = (live, new)
            if values and new.is_floating_point() and bool((local(half).isinf() & local(new).isfinite()).any()):
                beyond.append(name)
    for key_path, value in changed.items():
        content = _with(content, key_path, value)
    return Translated(content, list(beside.values()), dropped, beyond)


def _live_params(tree: dict[str, Any]) -> Iterator[tuple[Name, nn.Parameter]]:
    for path, live in stateful_objects(tree):
        if isinstance(live, nn.Module):
            for name, param in live.named_parameters(remove_duplicate=False):
                yield (path, plain_name(name)), param


def _besides(
    tree: dict[str, Any], content: dict[str, Any], header: dict[str, Any], params: dict[Name, nn.Parameter]
) -> Iterator[_Beside]:
    """Yields what is beside weights: an aligned optimizer's in its order, others' as the checkpoint names them."""
    live = {path: each for path, each in stateful_objects(tree) if isinstance(each, Optimizer)}
    all_names = {**(header.get("param_names") or {}), **param_names(tree)}
    for path, names in all_names.items():
        saved = _at(content, path)
        if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
            continue
        indices = [index for group in saved["param_groups"] for index in group["params"]]
        mine = [param for group in live[path].param_groups for param in group["params"]] if path in live else []
        for position, index in enumerate(indices[: len(names)]):
            for key in KEYS:
                value = saved["state"].get(index, {}).get(key)
                if isinstance(value, Tensor):
                    known = [params[tuple(name)] for name in names[position] if tuple(name) in params]
                    owner = known[0] if known else mine[position] if position < len(mine) else None
                    key_path = (*path, "state", index, key)
                    yield _Beside(key_path, value, [tuple(name) for name in names[position]], owner, path in live)


def _at(content: Any, key_path: KeyPath) -> Any:
    for key in key_path:
        if not isinstance(content, dict) or key not in content:
            return None
        content = content[key]
    return content


def _with(content: Any, key_path: KeyPath, value: Any) -> Any:
    """Returns `content` with `value` at the key path, or without what is there for None; nothing else is copied."""
    *path, key = key_path
    holder = copy.copy(_at(content, tuple(path)))  # with what is set on it: modules keep their versions there
    if value is None:
        del holder[key]
    else:
        holder[key] = value
    return replaced(content, tuple(path), holder)


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=torch.float32, device="meta")
