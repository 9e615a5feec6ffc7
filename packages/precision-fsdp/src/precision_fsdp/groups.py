"""Groups: which parameters are gathered together. FSDP casts, gathers and reduces a group together.

A group is a block (a module that the user or the default chose), without the blocks inside of it; the root is one, too.
Modules in it that need other casts than their block (exceptions of the policy, packed weights, norms that a plugin
keeps wide) form a second group beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from precision_core import Precision
from precision_core.policy import dtype_name
from precision_fsdp.policies import casts_of
from precision_fsdp.precision import FSDPPrecision


class GroupCasts(NamedTuple):
    """What the parameters of a group have in common."""

    stored: torch.dtype
    """Of those that train."""
    gathered: torch.dtype | None
    """None: as they are stored."""
    reduced: torch.dtype

    def policy(self) -> MixedPrecisionPolicy:
        """Returns them as FSDP2 takes them. Inputs and outputs are the plugin's to cast."""
        return MixedPrecisionPolicy(self.gathered, self.reduced, cast_forward_inputs=False)


@dataclass
class Group:
    """Modules that `fully_shard` gets as one; `name` is the first one's, or that of the block that they are in."""

    name: str
    casts: GroupCasts
    modules: list[nn.Module] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    params: dict[nn.Parameter, str] = field(default_factory=dict)
    beside: bool = False
    """Whether it is beside its block's own."""


def make_groups(root: nn.Module, blocks: Mapping[str, nn.Module], precision: Precision) -> list[Group]:
    """Returns the groups in the order in which they are to be sharded: what is inside first, the root last.

    Raises:
        ValueError: parameters that are tied across groups, a module that trains parameters of several dtypes, or a
            block that itself holds a parameter of other casts than what is in it.
    """
    groups: dict[tuple[str, GroupCasts | None], Group] = {}
    first_name = {module: name for name, module in (*blocks.items(), ("", root))}
    block_of: dict[str, str] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        block = block_of[name] = first_name.get(module, block_of.get(name.rpartition(".")[0], ""))
        if (block, None) not in groups:
            groups[block, None] = Group(block, _casts(precision, block), [module], [block])
        own = {param: key for key, param in module._parameters.items() if param is not None}
        if not own:
            continue
        casts = _casts(precision, name, own, type(module).__name__)
        group = groups[block, None]
        if casts != group.casts:
            group = groups.setdefault((block, casts), Group(block, casts, beside=True))
            if module not in group.modules:
                group.modules.append(module)
                group.names.append(name)
        for param, key in own.items():
            group.params[param] = f"{name}.{key}" if name else key
    _settle_own(groups)
    _check_tied(list(groups.values()))
    order = sorted(groups.values(), key=lambda group: (-group.name.count(".") - bool(group.name), not group.beside))
    return [group for group in order if group.params or not group.name]


def _settle_own(groups: dict[tuple[str, GroupCasts | None], Group]) -> None:
    """A block that is itself in the group beside its own takes that one's casts, where nothing else is in it."""
    for key, group in list(groups.items()):
        block = groups[group.name, None]
        if not group.beside or block.modules[0] not in group.modules:
            continue
        if block.params:
            own = [name for name in group.params.values() if name.rpartition(".")[0] == group.name]
            raise ValueError(
                f"{', '.join(own)}: FSDP gathers what {group.name or 'the model'} holds itself together with the rest "
                f"of it, and would cast it to {dtype_name(block.casts.gathered or block.casts.stored)} alike: hold it "
                "in a module of its own, or as a buffer if it does not train; a mixed mode stores all in float32"
            )
        groups[group.name, None] = replace(group, modules=block.modules, names=block.names, beside=False)
        del groups[key]


def _casts(
    precision: Precision, name: str, params: Mapping[nn.Parameter, str] | None = None, kind: str = ""
) -> GroupCasts:
    """Returns the casts of the module called `name`, of what its policy says, or of the parameters that it holds."""
    policy = precision.policy.for_module(name)
    casts = casts_of(policy)
    gathered = casts.param_dtype if isinstance(precision, FSDPPrecision) and policy.mixed else None
    stored = policy.params
    if params is not None:
        if any(precision.storage(param) is None for param in params):
            gathered = None
        trained = {param.dtype: key for param, key in params.items() if param.requires_grad}
        if len(trained) > 1:
            listed = ", ".join(f"{key} in {dtype_name(dtype)}" for dtype, key in trained.items())
            raise ValueError(
                f"{name or 'the model'} ({kind}) trains parameters of several dtypes: {listed}. FSDP reduces the "
                "gradients of a module in one: cast them alike (where the model marks some to stay float32, by an "
                f'exception such as "{name or "*"}: {policy}"), freeze some, hold them in modules of their own, or use '
                "a mixed mode [mixed-dtypes]"
            )
        stored = next(iter(trained), stored)
    return GroupCasts(stored, gathered, casts.reduce_dtype)


def _check_tied(groups: list[Group]) -> None:
    first: dict[nn.Parameter, tuple[Group, str]] = {}
    for group in groups:
        for param, name in group.params.items():
            other, other_name = first.setdefault(param, (group, name))
            if other is not group:
                raise ValueError(
                    f"{other_name} and {name} are one tied parameter in two groups of FSDP, {_title(other)} and "
                    f"{_title(group)}, which torch cannot gather: choose wrap=... so that both are in one (what is in "
                    "no group of its own is in the root's), and name both in exceptions of the policy, or neither"
                    " [tied-exception]"
                )


def _title(group: Group) -> str:
    return (f"{', '.join(group.names)} beside " if group.beside else "") + (group.name or "the root")
