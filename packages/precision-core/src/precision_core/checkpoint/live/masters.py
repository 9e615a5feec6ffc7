"""Masters: brings a checkpoint's weights, and the bits that an optimizer keeps of them, to what the live model stores.

A `bf16-master` run saves bfloat16 weights in the model, and in the optimizer's state the rest of their float32 values.
Float32 weights split exactly into both, and both make float32 weights again; bfloat16 alone cannot hold the rest.
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
from precision_core.precision.masters import EXACT, KEY, Masters

Name = tuple[KeyPath, str]


class Translated(NamedTuple):
    """The content as the live objects store it."""

    content: dict[str, Any]
    beside: list[tuple[nn.Parameter, Tensor]]
    """What to keep beside parameters once the content is loaded."""
    dropped: list[str]
    """Parameters that cannot hold the rest of their saved values."""

    @property
    def loss(self) -> str:
        """What the live objects cannot hold, in words; empty: they hold all."""
        names = listed(self.dropped, 5)
        return f"the other 16 bits of the float32 master weights of {names}, which are bfloat16 here" if names else ""


class _Rest(NamedTuple):
    """A rest in the content: where it is, its names, and the live parameter that it would be loaded for, if any."""

    path: KeyPath
    value: Tensor
    names: list[Name]
    owner: nn.Parameter | None
    is_loaded: bool
    """Whether an optimizer of the tree takes it."""


def translated(
    tree: dict[str, Any], content: dict[str, Any], header: dict[str, Any], masters: Masters, *, values: bool
) -> Translated:
    """Returns `content`, aligned to `tree`, with weights and rests as the objects in `tree` store them.

    Without `values`, tensors that change are on the meta device, of the right dtype: enough to compare.
    """
    params = dict(_live_params(tree))
    changed: dict[KeyPath, Any] = {}
    beside: dict[int, tuple[nn.Parameter, Tensor]] = {}
    dropped = []
    for rest in list(_rests(tree, content, header, params)):
        if rest.owner is None:
            continue
        if masters.holds(rest.owner):
            if not rest.is_loaded and not rest.value.is_meta:
                beside[id(rest.owner)] = (rest.owner, rest.value)
            continue
        changed[rest.path] = None
        weights = [(path, name) for path, name in rest.names if _at(content, (*path, name)) is not None]
        if rest.owner.dtype is torch.bfloat16 or not weights:
            dropped.append(rest.names[0][1] if rest.names else f"a parameter of shape {tuple(rest.value.shape)}")
            continue
        for path, name in weights:
            weight = _at(content, (*path, name))
            if isinstance(weight, Tensor) and weight.dtype is torch.bfloat16:
                full = masters.combined(weight, rest.value) if values else _meta(weight, torch.float32)
                changed[(*path, name)] = full
    for (path, name), live in params.items():
        weight = _at(content, (*path, name))
        if isinstance(weight, Tensor) and weight.dtype in EXACT and masters.holds(live):
            changed[(*path, name)], new = masters.split(weight) if values else _meta_pair(weight)
            beside[id(live)] = (live, new)
    for key_path, value in changed.items():
        content = _with(content, key_path, value)
    return Translated(content, list(beside.values()), dropped)


def _live_params(tree: dict[str, Any]) -> Iterator[tuple[Name, nn.Parameter]]:
    for path, live in stateful_objects(tree):
        if isinstance(live, nn.Module):
            for name, param in live.named_parameters(remove_duplicate=False):
                yield (path, plain_name(name)), param


def _rests(
    tree: dict[str, Any], content: dict[str, Any], header: dict[str, Any], params: dict[Name, nn.Parameter]
) -> Iterator[_Rest]:
    """Yields the rests in the content: an aligned optimizer's in its order, others' as the checkpoint names them."""
    live = {path: each for path, each in stateful_objects(tree) if isinstance(each, Optimizer)}
    all_names = {**(header.get("param_names") or {}), **param_names(tree)}
    for path, names in all_names.items():
        saved = _at(content, path)
        if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
            continue
        indices = [index for group in saved["param_groups"] for index in group["params"]]
        mine = [param for group in live[path].param_groups for param in group["params"]] if path in live else []
        for position, index in enumerate(indices[: len(names)]):
            value = saved["state"].get(index, {}).get(KEY)
            if isinstance(value, Tensor):
                known = [params[tuple(name)] for name in names[position] if tuple(name) in params]
                owner = known[0] if known else mine[position] if position < len(mine) else None
                key_path = (*path, "state", index, KEY)
                yield _Rest(key_path, value, [tuple(name) for name in names[position]], owner, path in live)


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


def _meta(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(tensor.shape, dtype=dtype, device="meta")


def _meta_pair(tensor: Tensor) -> tuple[Tensor, Tensor]:
    return _meta(tensor, torch.bfloat16), _meta(tensor, torch.int16)
