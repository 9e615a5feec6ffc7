"""Wide gradients: shards of gradients stay float32 where parameters are half (`grads=float32`).

FSDP2 reduces in `reduce_dtype`, adds up what is not reduced yet in it, and then casts the shard to the dtype that the
parameter had: a private attribute of each group, which is changed here. torch lets a gradient be wider than its
parameter where `grad_dtype` says so (2.10 and later). tests/test_wide_gradients.py holds what is read of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from precision_core import Policy
from precision_core.policy import dtype_name
from precision_fsdp.unsynced import groups_of, handles

_NAME = "_orig_dtype"


def why_not(policy: Policy) -> str | None:
    """Returns why FSDP2 does not keep the policy's gradients as wide as it says, and what to say instead."""
    if policy.grads is policy.params or policy.reduce is policy.grads:
        return None
    grads, reduce = dtype_name(policy.grads), dtype_name(policy.reduce)
    return (
        f"FSDP2 adds up gradients in the dtype that it reduces in, so grads={grads} needs reduce={grads}, and here is "
        f"reduce={reduce}: say reduce={grads}, or leave grads out"
    )


def keep_wide(root: nn.Module, policy: Policy) -> Iterator[Callable[[], None]]:
    """Has the gradients of sharded half parameters stay in `policy.grads`; yields what undoes it.

    To be called after FSDP2 has looked at the dtypes, in the first forward.

    Raises:
        RuntimeError: this torch has no such private name.
    """
    for handle in handles(root):
        param = handle.sharded_param
        if param.dtype is policy.params and param.grad_dtype is param.dtype:
            param.grad_dtype = policy.grads
    for group in groups_of(root):
        if not hasattr(group, _NAME):
            raise RuntimeError(
                f"torch {torch.__version__} has no {type(group).__name__}.{_NAME}, a private name by which "
                f"FSDPStrategy keeps gradients wider than parameters: leave grads={dtype_name(policy.grads)} out, or "
                "use a torch that precision-fsdp was run with (its README says which)"
            )
        if getattr(group, _NAME) is policy.params:
            setattr(group, _NAME, policy.grads)
            yield _undo(group, policy.params)


def _undo(group: Any, dtype: torch.dtype) -> Callable[[], None]:
    return lambda: setattr(group, _NAME, dtype)
