"""The calls of a model: by its hooks, or around what `model.compile()` has put in its place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

Before = Callable[[nn.Module, Any, Any], None]
After = Callable[[nn.Module, Any, Any], None]


def follow(model: nn.Module, before: Before, after: After) -> Callable[[], None]:
    """Has `before` called with (model, args, kwargs) and `after` with (model, args, output). Returns what undoes it.

    Hooks of a module that was compiled in place are compiled with it, and see nothing.
    """
    compiled = model._compiled_call_impl
    if compiled is None:
        hooks = ExitStack()
        hooks.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        hooks.callback(model.register_forward_hook(after).remove)
        return hooks.close

    @functools.wraps(compiled)
    def call(*args: Any, **kwargs: Any) -> Any:
        before(model, args, kwargs)
        output = compiled(*args, **kwargs)
        after(model, args, output)
        return output

    model._compiled_call_impl = call

    def restore() -> None:
        if model._compiled_call_impl is call:
            model._compiled_call_impl = compiled

    return restore
