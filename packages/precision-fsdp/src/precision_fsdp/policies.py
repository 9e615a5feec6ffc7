"""Policies: what FSDP is told of a `Policy`, in one function that plugin and strategy share.

| mode                 | param_dtype    | reduce_dtype | buffer_dtype | output_dtype |
| 32-true, 64-true     | as the mode    | same         | same         | same         |
| bf16-true, 16-true   | as the mode    | same         | same         | float32      |
| bf16-mixed, 16-mixed | the half dtype | float32      | float32      | float32      |
| bf16-, 16-master     | the half dtype | float32      | as params    | float32      |
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy

from precision_core import Policy
from precision_core.policy import FLOAT_DTYPES, dtype_name


class Casts(NamedTuple):
    """The dtypes of a policy in the words of FSDP: what FSDP1's and FSDP2's objects are made of."""

    param_dtype: torch.dtype
    """That parameters are gathered in for forward and backward."""
    reduce_dtype: torch.dtype
    """That gradients are reduced in."""
    buffer_dtype: torch.dtype
    """That floating buffers are kept in; FSDP2 has no such field."""
    output_dtype: torch.dtype
    """That the model returns; FSDP1 has no such field."""

    def for_fsdp1(self) -> MixedPrecision:
        """Returns FSDP1's object. Inputs are the plugin's to cast, so FSDP does not."""
        return MixedPrecision(
            param_dtype=self.param_dtype,
            reduce_dtype=self.reduce_dtype,
            buffer_dtype=self.buffer_dtype,
            cast_forward_inputs=False,
            cast_root_forward_inputs=False,
        )

    def for_fsdp2(self, root: bool = False) -> MixedPrecisionPolicy:
        """Returns FSDP2's object; with an output dtype for the `root` only, since blocks must match each other."""
        return MixedPrecisionPolicy(
            param_dtype=self.param_dtype,
            reduce_dtype=self.reduce_dtype,
            output_dtype=self.output_dtype if root else None,
            cast_forward_inputs=False,
        )


def casts_of(policy: Policy) -> Casts:
    """Returns what FSDP is to cast under `policy` (its exceptions have casts of their own)."""
    return Casts(policy.compute, policy.reduce, policy.buffers, policy.output)


FSDPPolicy: TypeAlias = MixedPrecision | MixedPrecisionPolicy


def check_fsdp_policy(given: Any) -> FSDPPolicy | None:
    """Returns what was given as `mixed_precision`; raises `ValueError` for any other type than torch's."""
    if given is not None and not isinstance(given, (MixedPrecision, MixedPrecisionPolicy)):
        raise ValueError(
            f"FSDPStrategy(mixed_precision={given!r}): expected torch.distributed.fsdp.MixedPrecision, "
            "MixedPrecisionPolicy, or None for what the precision says"
        )
    for name in ("param_dtype", "reduce_dtype", "buffer_dtype", "output_dtype"):
        dtype = getattr(given, name, None)
        if dtype is not None and dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"FSDPStrategy(mixed_precision=...) has {name}={dtype}: allowed are "
                f"{', '.join(sorted(map(dtype_name, FLOAT_DTYPES)))}"
            )
    if getattr(given, "keep_low_precision_grads", False):
        raise ValueError(
            "FSDPStrategy(mixed_precision=MixedPrecision(keep_low_precision_grads=True)): gradients have the dtype of "
            "their parameters; leave it out, or choose a true mode"
        )
    return given


def overridden(policy: Policy, given: FSDPPolicy | None) -> tuple[Policy, list[str]]:
    """Returns `policy` with the reduce, buffer and output dtypes that `given` names, and a line for each change.

    Its fields on inputs are not read.

    Raises:
        ValueError: `param_dtype` is not what the policy computes in.
    """
    if given is None:
        return policy, []
    if given.param_dtype not in (None, policy.compute):
        raise ValueError(
            f"FSDPStrategy(mixed_precision=...) has param_dtype={given.param_dtype}, and this precision computes in "
            f"{policy.compute}: leave param_dtype out, or choose the precision that computes in it"
        )
    changes: dict[str, Any] = {}
    for key, name in (("reduce", "reduce_dtype"), ("buffers", "buffer_dtype"), ("output", "output_dtype")):
        dtype = getattr(given, name, None)
        if dtype not in (None, getattr(policy, key)):
            changes[key] = dtype
    lines = [
        f"fsdp: {key} in {dtype_name(dtype)} as mixed_precision says, not in {dtype_name(getattr(policy, key))}"
        for key, dtype in changes.items()
    ]
    return replace(policy, **changes), lines
