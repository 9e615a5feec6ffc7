"""Wide: what stays float32 in half modes, in one table for every package.

Some tensors must not be rounded, whatever the mode: models mark some, and `RULES` finds others. An exception of the
policy that covers the module has priority over this table, and so has `buffers=` of a plugin.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from precision_core.policy.dtypes import FLOAT_DTYPES, HALF_DTYPES
from precision_core.policy.patterns import covers, matches
from precision_core.policy.policy import Policy

_MARKS = {
    "_keep_in_fp32_modules": (torch.float16,),
    "_keep_in_fp32_modules_strict": HALF_DTYPES,
}
"""Attributes by which transformers' models name parameters to keep, and for which dtypes they mean it."""

_STATISTICS = ("running_mean", "running_var")

_ROUTER = ("*correction_bias", "*expert_bias")


class Slot(NamedTuple):
    """A parameter or buffer of a module, called `name` from the root; `marked`: the model says to keep it."""

    name: str
    key: str
    tensor: Tensor
    module: nn.Module
    is_buffer: bool
    marked: bool


class Rule(NamedTuple):
    """Tensors that stay float32, and why; `upcasts`: one that arrives narrower becomes float32 again."""

    why: str
    holds: Callable[[Slot], bool]
    upcasts: bool


RULES: tuple[Rule, ...] = (
    Rule("the model marks it to stay so", lambda slot: slot.marked, True),
    Rule(
        "running statistics, which small updates would not move in a half dtype, and their layer's weights",
        lambda slot: _has_statistics(slot.module),
        True,
    ),
    Rule(
        "a router's correction bias, whose rounding would send tokens to other experts",
        lambda slot: any(matches(pattern, slot.name) for pattern in _ROUTER),
        True,
    ),
    Rule(
        "rotary frequencies, whose rounding would turn far positions",
        lambda slot: slot.is_buffer and matches("*inv_freq", slot.name),
        False,
    ),
    Rule(
        "a table that the model computes itself and does not save (not persistent)",
        lambda slot: slot.is_buffer and slot.key in getattr(slot.module, "_non_persistent_buffers_set", ()),
        False,
    ),
)


class Wide:
    """The tensors of `root` that stay float32 under `policy`: `why` holds their names and reasons.

    `buffers=False` leaves all buffers out, and with them the weights that only follow their statistics. `params=False`
    is for an engine that stores all parameters alike: `cast` then names those that the model marks.
    """

    def __init__(self, root: nn.Module, policy: Policy, *, params: bool = True, buffers: bool = True) -> None:
        self.why: dict[str, str] = {}
        self.cast: list[str] = []
        if policy.params not in HALF_DTYPES:
            return
        shared: dict[int, list[str]] = {}  # a tensor that two modules hold stays wide in both
        found: dict[int, Rule] = {}
        for slot in _slots(root, policy):
            if slot.tensor.dtype not in FLOAT_DTYPES:
                continue
            shared.setdefault(id(slot.tensor), []).append(slot.name)
            rule = next((rule for rule in RULES if rule.holds(slot)), None)
            if rule is None or not (buffers or (rule is RULES[0] and not slot.is_buffer)):
                continue
            if not (params or slot.is_buffer):
                self.cast += [slot.name] * slot.marked
            elif rule.upcasts or slot.tensor.dtype not in HALF_DTYPES:
                found.setdefault(id(slot.tensor), rule)
        for key, rule in found.items():
            self.why.update(dict.fromkeys(shared[key], f"kept in float32: {rule.why}"))

    def __contains__(self, name: str) -> bool:
        return name in self.why


def _has_statistics(module: nn.Module) -> bool:
    if isinstance(module, _NormBase):
        return module.running_mean is not None
    return any(key in module._buffers and module._buffers[key] is not None for key in _STATISTICS)


def _slots(root: nn.Module, policy: Policy) -> Iterator[Slot]:
    """Yields every floating parameter and buffer, under each of its names, that no exception covers."""
    marks = list(_marks(root, policy.params))
    for prefix, module in root.named_modules(remove_duplicate=False):
        if any(covers(pattern, prefix) for pattern, _ in policy.exceptions):
            continue
        for is_buffer, table in ((False, module._parameters), (True, module._buffers)):
            for key, tensor in table.items():
                if tensor is not None:
                    name = f"{prefix}.{key}" if prefix else key
                    marked = any(mark.search(name) for mark in marks)
                    yield Slot(name, key, tensor, module, is_buffer, marked)


def marks(module: nn.Module) -> Iterator[tuple[str, tuple[torch.dtype, ...]]]:
    """Yields the parts of names that this module marks to stay wide, and under which dtypes."""
    for attribute, dtypes in _MARKS.items():
        names = getattr(module, attribute, None)
        for name in (names,) if isinstance(names, str) else names if isinstance(names, Iterable) else ():
            yield name, dtypes


def _marks(root: nn.Module, dtype: torch.dtype) -> Iterator[re.Pattern[str]]:
    """Yields patterns of what modules of `root` mark: the marks match full parts of a dotted name."""
    for prefix, module in root.named_modules(remove_duplicate=False):
        parts = sorted({".*".join(map(re.escape, name.split("*"))) for name, of in marks(module) if dtype in of})
        if parts:
            start = re.escape(f"{prefix}.") if prefix else ""
            yield re.compile(rf"^{start}(?:.*\.)?(?:{'|'.join(parts)})(?:\.|$)")
