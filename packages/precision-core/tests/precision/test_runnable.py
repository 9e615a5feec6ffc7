"""Runnable policies: all that core's plugins run, and for every other valid one who does, at construction."""

from __future__ import annotations

import pytest
import torch

from precision_core import DoublePrecision, Fabric, HalfPrecision, MixedPrecision, Policy, Precision
from precision_core.precision.runnable import check_runnable

HALVES = ("float16", "bfloat16")

# policy, what the message must say
REFUSED = [
    ("16-mixed; head: 16-master", "a step stores all float16 parameters alike: say head: 32-true"),
    ("16-master; head: 16-true", "say head: params=float16,compute=float16,reduce=float16,output=float32,"),
    ("params=float16,master=float32,rounding=stochastic,state=bfloat16", "stochastic rounding is for bfloat16"),
    ("bf16-true; head: bf16-master", "a step stores all bfloat16 parameters alike: say head: params=bfloat16,"),
    (
        "bf16-master; head: bf16-true",
        "head would store its parameters and their state otherwise than the policy around",
    ),
    ("32-true; head: bf16-master", "or head: 32-true"),
    ("params=float32,state=bfloat16", "core chooses the dtype of state for half params only"),
    ("params=float16,rounding=stochastic", "stochastic rounding is for bfloat16; say params=bfloat16, or"),
    ("params=float64,compute=float32", "use 64-true, or float32 params"),
    ("params=float64,compute=bfloat16", "nothing runs float64 params under a narrower compute"),
    ("params=float32,compute=float64", "which knows bfloat16 and float16; nothing runs another"),
    ("params=bfloat16,compute=float32", "which knows bfloat16 and float16; nothing runs another"),
    ("scale=true", "nothing scales the loss without float16 compute; say scale=false"),
    ("params=float32,compute=bfloat16,scale=true", "nothing scales the loss without float16 compute"),
    ("params=float16,scale=true", "say params=float32 (16-mixed), or params=float16,master=float32 (16-master)"),
    ("params=float16,compute=bfloat16", "say params=float32, or compute like params"),
    ("params=bfloat16,compute=float16", "say params=float32, or compute like params"),
    ("32-true; head: params=float64,compute=float32", "nothing runs float64 params under a narrower compute"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_policies_that_nobody_here_runs_are_refused_at_construction(text: str, message: str) -> None:
    policy = Policy.parse(text)  # valid as a value
    for construct in (
        lambda: check_runnable(policy),
        lambda: Fabric("cpu", precision=text),
        lambda: Precision(policy=policy),
        lambda: DoublePrecision(policy=text),
        lambda: HalfPrecision(policy),
        lambda: MixedPrecision(policy, device="cpu"),
    ):
        with pytest.raises(ValueError) as error:
            construct()
        assert message in str(error.value) and f"precision={str(policy)!r} cannot run here: " in str(error.value)


def test_exactly_these_dtypes_run() -> None:
    dtypes = ("float64", "float32", *HALVES)
    runnable = {(dtype, dtype, False) for dtype in dtypes}
    runnable |= {("float32", half, False) for half in HALVES} | {("float32", "float16", True)}
    for params in dtypes:
        for compute in dtypes:
            for scale in (False, True):
                policy = Policy(params, compute, scale=scale)
                if (params, compute, scale) in runnable:
                    check_runnable(policy)
                else:
                    with pytest.raises(ValueError, match="cannot run here"):
                        check_runnable(policy)


@pytest.mark.parametrize("field", ["reduce", "output", "buffers"])
def test_the_other_dtypes_are_free(field: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        check_runnable(Policy(compute="bfloat16", **{field: dtype}))  # type: ignore[arg-type]
