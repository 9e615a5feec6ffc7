"""`fabric.init_module()`: parameters are born in the mode's dtype, whatever initialises them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precision_core import Fabric

DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16}

INITIALISERS: dict[str, Callable[[Tensor], Any]] = {
    "orthogonal_": nn.init.orthogonal_,  # qr has no half kernel
    "trunc_normal_": nn.init.trunc_normal_,
    "kaiming_normal_": nn.init.kaiming_normal_,
    "sparse_": lambda weight: nn.init.sparse_(weight, 0.5),
    "a factorisation of the user's": lambda weight: weight.data.copy_(torch.linalg.svd(torch.randn_like(weight))[0]),
    "an inverse": lambda weight: weight.data.copy_(torch.linalg.inv(torch.eye(8, dtype=weight.dtype) * 2)),
    "a pseudo-inverse": lambda weight: weight.data.copy_(torch.linalg.pinv(torch.eye(8, dtype=weight.dtype) * 2)),
}


@pytest.mark.parametrize("mode", DTYPES)
@pytest.mark.parametrize("initialise", INITIALISERS.values(), ids=INITIALISERS)
def test_initialisers_run_and_leave_the_dtype(mode: str, initialise: Callable[[Tensor], Any]) -> None:
    with Fabric(accelerator="cpu", precision=mode).init_module():
        layer = nn.Linear(8, 8)
        initialise(layer.weight)
    weight = layer.weight.detach()
    assert weight.dtype is layer.bias.dtype is DTYPES[mode] and weight.isfinite().all() and weight.any()
    if initialise is nn.init.orthogonal_ or "factorisation" in {v: k for k, v in INITIALISERS.items()}[initialise]:
        assert torch.allclose(weight.float() @ weight.float().T, torch.eye(8), atol=0.05)


def test_other_errors_come_as_they_are() -> None:
    with (
        pytest.raises(RuntimeError, match="shapes cannot be multiplied"),
        Fabric(accelerator="cpu", precision="bf16-true").init_module(),
    ):
        torch.ones(2, 3, dtype=torch.bfloat16) @ torch.ones(2, 3, dtype=torch.bfloat16)
