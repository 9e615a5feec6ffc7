"""Which objects load their own way: custom objects and user hooks may raise, and change what is not in `state_dict`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from precision_core.checkpoint.live.state import plain_name

_FSDP = "torch.distributed.fsdp."
_OURS = "precision_core.precision.update."
_TORCHS = ("torch.nn.modules.", "torch.optim.")
"""Modules of layers and optimizers that load the standard way (unlike, say, ZeroRedundancyOptimizer)."""


def overrides(live: Any, method: str) -> bool:
    """Whether `method` is overridden, by a subclass or on the instance, and so not torch's."""
    return method in vars(live) or not getattr(type(live), method).__module__.startswith(_TORCHS)


def loads_its_own_way(live: Any) -> bool:
    """Whether loading an optimizer, a layer (without its children) or another object runs code that is not torch's."""
    if isinstance(live, nn.Module):
        extra = type(live).set_extra_state is not nn.Module.set_extra_state
        return judges_for_itself(live) or extra or _hooks(live._load_state_dict_post_hooks) > 0
    if isinstance(live, Optimizer):
        hooks = (live._optimizer_load_state_dict_pre_hooks, live._optimizer_load_state_dict_post_hooks)
        return (
            any(_hooks(each) for each in hooks) or overrides(live, "load_state_dict") or overrides(live, "__setstate__")
        )
    return True


def judges_for_itself(layer: nn.Module) -> bool:
    """Whether a layer may rename, reshape or reject what it is given, so that its keys cannot be compared."""
    hooks = _hooks(layer._load_state_dict_pre_hooks) - hasattr(layer, "_load_hook")  # less a lazy layer's own
    return hooks > 0 or overrides(layer, "_load_from_state_dict")


def own_prefixes(module: nn.Module, is_own: Callable[[nn.Module], bool]) -> tuple[str, ...]:
    """Returns the name prefixes of the layers that satisfy `is_own`; "" (all) if `module` overrides `load_state_dict`.

    Only the root's `load_state_dict` is called, never a child's.
    """
    names = [plain_name(name) for name, layer in module.named_modules() if is_own(layer)]
    return ("",) if overrides(module, "load_state_dict") else tuple(f"{name}." if name else "" for name in names)


def _hooks(hooks: Mapping[Any, Any]) -> int:
    """Returns how many hooks are neither FSDP2's, which bring shards back, nor ours, which keep dtypes of state."""
    functions = [getattr(hook, "hook", hook) for hook in hooks.values()]
    return sum(not str(getattr(function, "__module__", "")).startswith((_FSDP, _OURS)) for function in functions)
