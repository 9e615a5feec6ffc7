"""Moves hooks from a module to the one that replaces it."""

from __future__ import annotations

import weakref
from collections import OrderedDict

from torch import nn
from torch.nn.modules.module import _WrappedHook

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Moves all hooks of `old` to `new`, after its own; handles that users hold still remove them.

    Raises:
        ValueError: one has full backward hooks, the other non-full ones; nothing was changed.
    """
    if old._backward_hooks:
        if new._backward_hooks and new._is_full_backward_hook is not old._is_full_backward_hook:
            raise ValueError("full and non-full backward hooks cannot be on one module")
        new._is_full_backward_hook = old._is_full_backward_hook
    for key in _HOOKS:
        # A handle refers to the dict that holds its hook, so the dict moves, not its items.
        hooks, of_new = vars(old)[key], vars(new)[key]
        mine = dict(hooks)
        hooks.clear()
        hooks.update(of_new | mine)
        vars(old)[key], vars(new)[key] = OrderedDict(), hooks
    for hook in new._load_state_dict_pre_hooks.values():
        if isinstance(hook, _WrappedHook) and hook.with_module and hook.module() is old:
            hook.module = weakref.ref(new)
