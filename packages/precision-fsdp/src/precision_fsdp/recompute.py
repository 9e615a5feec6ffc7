"""Activation checkpointing: blocks whose forward runs again in backward, in the same precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from precision_core import Precision
from precision_core.override import override
from precision_core.precision import Restore, created_as
from precision_fsdp.block_arguments import unchanged
from precision_fsdp.selection import One, select

Context = Callable[[], AbstractContextManager[Any]]


def to_recompute(
    given: bool | tuple[One, ...] | None, root: nn.Module, blocks: dict[str, nn.Module]
) -> dict[str, nn.Module]:
    """Returns the modules that are meant by `activation_checkpointing`, by name; True: `blocks`.

    Raises:
        ValueError: True where there are no blocks, or a selection that matches nothing.
    """
    if given is None or given is False:
        return {}
    if given is not True:
        return select("activation_checkpointing", given, root)
    if not blocks:
        raise ValueError(
            f"FSDPStrategy(activation_checkpointing=True) found no repeated block in this {type(root).__name__}: "
            "name the blocks in place of True"
        )
    return blocks


def recompute(modules: Iterable[tuple[str, nn.Module]], precision: Precision) -> list[Restore]:
    """Overrides the forward of `modules` (name, module), keys and classes stay; returns what undoes it."""
    return [override(module, "forward", _make(_context(precision, name))) for name, module in modules]


def _context(precision: Precision, name: str) -> Context:
    """Returns the context of the module's forward: a function mode is off where backward runs it again."""
    policy = precision.policy.for_module(name)
    if policy == precision.policy.flat:
        return precision.forward_context
    return nullcontext if policy.mixed else lambda: created_as(policy.params)


def _make(context: Context) -> Callable[..., Any]:
    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), context()

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return function(self, *args, **kwargs)
            before = unchanged((args, kwargs))
            is_repeated = False

            def run(self: nn.Module, *args: Any) -> Any:  # else checkpoint takes what is called as its own options
                nonlocal is_repeated
                given, named = unchanged(before) if is_repeated else (args, kwargs)
                is_repeated = True
                return function(self, *given, **named)

            return checkpoint(run, self, *args, use_reentrant=False, context_fn=contexts)

        return forward

    return make
