"""Exceptions: modules inside the model that run under a policy of their own.

Every module has an effective policy: that of the first exception which covers it, else the model's. Where it differs
from the parent's, the module is the root of a region, and its forward is overridden: inputs are cast to what the region
takes, autocast and the dtype of created tensors are switched, and outputs come back in the region's `output`.

A `-true` policy around a region meets tensors of the region's output dtype, which torch's layers do not mix with their
own weights. So its layers, those modules that hold parameters themselves, cast what they are given.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from precision_core.casting import cast, map_tensors
from precision_core.creation import created_as
from precision_core.override import override
from precision_core.patterns import check_all_used
from precision_core.policy import Policy

Restore = Callable[[], None]


class EffectivePolicies:
    """The policy of each module of `root`, by name and by module.

    Raises:
        ValueError: an exception's pattern matches no module, or a parameter is tied across policies that store it in
            different dtypes.
    """

    def __init__(self, root: nn.Module, policy: Policy) -> None:
        names = [name for name, _ in root.named_modules(remove_duplicate=False)]
        check_all_used((pattern for pattern, _ in policy.exceptions), names, "module")
        self.base = policy.flat
        self.by_name = {name: policy.for_module(name) if policy.exceptions else self.base for name in names}
        if policy.exceptions:
            self._check_tied(root)

    def of(self, name: str) -> Policy:
        """Returns the policy of the module that holds the parameter or buffer called `name`."""
        return self.by_name[name.rpartition(".")[0]]

    def parent(self, name: str) -> Policy:
        """Returns the policy around the module called `name`."""
        return self.by_name[name.rpartition(".")[0]] if name else self.base

    def _check_tied(self, root: nn.Module) -> None:
        first: dict[nn.Parameter, str] = {}
        for name, param in root.named_parameters(remove_duplicate=False):
            other = first.setdefault(param, name)
            if self.of(other).params is not self.of(name).params:
                raise ValueError(
                    f"{other} and {name} are one tied parameter, but the policy stores it as {self.of(other).params} "
                    f"and as {self.of(name).params}: name both modules in the exception, or neither"
                )


def apply_exceptions(root: nn.Module, policies: EffectivePolicies, device_type: str) -> list[Restore]:
    """Overrides the forward of each region's root, and of layers around regions; returns what undoes it."""
    restores: list[Restore] = []
    if all(policy == policies.base for policy in policies.by_name.values()):
        return restores
    done: set[nn.Module] = set()
    for name, module in root.named_modules(remove_duplicate=False):
        policy, parent = policies.by_name[name], policies.parent(name)
        if policy != parent:
            make = _region(policy, parent, device_type)
        elif not policy.mixed and next(module.parameters(recurse=False), None) is not None:
            make = _layer(policy.compute)
        else:
            continue
        if module not in done:
            done.add(module)
            restores.append(override(module, "forward", make))
    return restores


def _region(policy: Policy, parent: Policy, device_type: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    takes = policy.params if not policy.mixed or policy.params is not parent.params else None
    mine = (policy.params, policy.compute)

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if takes is not None:
                args, kwargs = cast((args, kwargs), takes)
            with ExitStack() as stack:
                if policy.mixed or parent.mixed:
                    stack.enter_context(
                        torch.autocast(device_type, dtype=_autocast_dtype(policy), enabled=policy.mixed)
                    )
                if policy.params is not parent.params:
                    stack.enter_context(created_as(policy.params))
                output = function(self, *args, **kwargs)
            return map_tensors(output, lambda tensor: tensor.to(policy.output) if tensor.dtype in mine else tensor)

        return forward

    return make


def _autocast_dtype(policy: Policy) -> torch.dtype:
    return policy.compute if policy.mixed else torch.bfloat16  # a disabled autocast wants a valid dtype too


def _layer(dtype: torch.dtype) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = cast((args, kwargs), dtype)
            return function(self, *args, **kwargs)

        return forward

    return make
