"""Regions: modules inside the model with a policy of their own, an exception of the model's.

Every module has an effective policy: that of the first exception which covers it, else the model's. Where it differs
from the parent's, the module is the root of a region, and its forward is overridden: inputs are cast to what the region
takes, autocast and the dtype of created tensors are switched, and outputs come back in the region's `output`.

A `-true` policy around a region meets tensors of the region's output dtype, which torch's layers do not mix with their
own weights. So its layers, those modules that hold parameters themselves, cast what they are given.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from precision_core.override import override
from precision_core.policy.casting import cast, map_tensors
from precision_core.policy.patterns import check_all_used
from precision_core.policy.policy import Policy
from precision_core.precision.model.default_dtype import created_as

Restore = Callable[[], None]


class EffectivePolicies:
    """The policy of each module of `root`, by name.

    Raises:
        ValueError: an exception that cannot hold: its pattern matches no module, a parameter is tied across policies
            that store it in different dtypes, a module is shared across policies, or its forward is never called.
    """

    def __init__(self, root: nn.Module, policy: Policy) -> None:
        modules = dict(root.named_modules(remove_duplicate=False))
        check_all_used((pattern for pattern, _ in policy.exceptions), modules, "module")
        self.base = policy.flat
        self.by_name = {name: policy.for_module(name) if policy.exceptions else self.base for name in modules}
        self._around: dict[str, Policy] = {}
        for name, module in modules.items():
            # A ModuleList has no forward to override, so its policy begins at the modules in it.
            self._around[name] = self.by_name[name] if _has_forward(module) else self.parent(name)
        if policy.exceptions:
            self._check_tied(root)
            self._check_roots(modules)

    def of(self, name: str) -> Policy:
        """Returns the policy of the module that holds the parameter or buffer called `name`."""
        return self.by_name[name.rpartition(".")[0]]

    def parent(self, name: str) -> Policy:
        """Returns the policy of the forward that calls the module called `name`."""
        return self._around[name.rpartition(".")[0]] if name else self.base

    def _check_tied(self, root: nn.Module) -> None:
        first: dict[nn.Parameter, str] = {}
        for name, param in root.named_parameters(remove_duplicate=False):
            other = first.setdefault(param, name)
            if self.of(other).params is not self.of(name).params:
                raise ValueError(
                    f"{other} and {name} are one tied parameter, but the policy stores it as {self.of(other).params} "
                    f"and as {self.of(name).params}: name both modules in the exception, or neither [tied-exception]"
                )

    def _check_roots(self, modules: dict[str, nn.Module]) -> None:
        first: dict[nn.Module, str] = {}
        for name, module in modules.items():
            other = first.setdefault(module, name)
            is_root = self.by_name[name] != self.parent(name) or self.by_name[other] != self.parent(other)
            if is_root and self.by_name[name] != self.by_name[other]:
                raise ValueError(
                    f"{other} and {name} are one shared module, but the policy runs it as {self.by_name[other]} "
                    f"and as {self.by_name[name]}: name both in the exception, or neither [tied-exception]"
                )
            around = name.rpartition(".")[0]
            if name and is_root and isinstance(modules[around], nn.MultiheadAttention):
                raise ValueError(
                    f"the exception for {name} would do nothing: torch's MultiheadAttention uses its weights without "
                    f"calling its forward; name {around or 'the whole model'} instead"
                )


def apply_exceptions(root: nn.Module, policies: EffectivePolicies, device_type: str | None) -> list[Restore]:
    """Overrides the forward of each region's root, and of layers around regions; returns what undoes it.

    `device_type` is autocast's; None: that of each region's parameters, when it runs.
    """
    restores: list[Restore] = []
    if all(policy == policies.base for policy in policies.by_name.values()):
        return restores
    done: set[nn.Module] = set()
    for name, module in root.named_modules(remove_duplicate=False):
        policy, parent = policies.by_name[name], policies.parent(name)
        if not _has_forward(module) or module in done:
            continue
        if policy != parent:
            make = _region(policy, parent, device_type)
        elif not policy.mixed and _is_layer(module):
            make = casting_inputs(policy.compute)
        else:
            continue
        done.add(module)
        restores.append(override(module, "forward", make))
    return restores


def _has_forward(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):  # whose class has none to look at
        return True
    return "forward" in module.__dict__ or type(module).forward is not nn.Module.forward


def _is_layer(module: nn.Module) -> bool:
    # A batch norm without weights meets its inputs with running statistics.
    return next(module.parameters(recurse=False), None) is not None or isinstance(module, _NormBase)


def _region(policy: Policy, parent: Policy, device_type: str | None) -> Callable[..., Callable[..., Any]]:
    takes = policy.params if not policy.mixed or policy.params is not parent.params else None
    mine = (policy.params, policy.compute)
    switches_autocast = policy.mixed or parent.mixed
    autocast_dtype = policy.compute if policy.mixed else torch.bfloat16  # a disabled one wants a valid dtype too
    switches_created = policy.params is not parent.params

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if takes is not None:
                args, kwargs = cast((args, kwargs), takes)
            # Plain `with` statements: torch.compile traces no ExitStack around autocast.
            with (
                torch.autocast(device_type or _device_type(self), dtype=autocast_dtype, enabled=policy.mixed)
                if switches_autocast
                else nullcontext(),
                created_as(policy.params) if switches_created else nullcontext(),
            ):
                output = function(self, *args, **kwargs)
            return map_tensors(output, lambda tensor: tensor.to(policy.output) if tensor.dtype in mine else tensor)

        return forward

    return make


def _device_type(module: nn.Module) -> str:
    param = next(module.parameters(), None)
    return "cpu" if param is None else param.device.type


def casting_inputs(dtype: torch.dtype) -> Callable[..., Callable[..., Any]]:
    """Returns what `override` takes for a forward that casts its floating arguments to `dtype`."""

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = cast((args, kwargs), dtype)
            return function(self, *args, **kwargs)

        return forward

    return make
