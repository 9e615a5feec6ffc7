"""Attention in mixed modes, where queries and keys are float32 and values are not, as with rotary positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from precision_core import Fabric
from precision_xla import vendor
from precision_xla.programs import matrix_products
from precision_xla.support import RUNS as MODES


class Rotating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.register_buffer("angles", torch.linspace(0, 1, 32).view(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.qkv(x).chunk(3, dim=-1))
        return scaled_dot_product_attention(q * self.angles.cos(), key=k * self.angles.cos(), value=v, is_causal=True)


@pytest.mark.parametrize("mode", ["bf16-mixed", "16-mixed", "32-true"])
def test_rotated_queries_and_keys_are_cast_with_the_values(mode: str) -> None:
    outputs = []
    for strategy in ("single_device", "xla"):
        torch.manual_seed(0)
        fabric, model = Fabric(accelerator="cpu", strategy=strategy, precision=mode), Rotating()
        fabric.setup(model)
        output = model(torch.linspace(-1, 1, 64).view(2, 4, 8).to(fabric.device))
        program = vendor.hlo([output]) if strategy == "xla" else ""  # before its value is read
        outputs.append(output.detach().float().cpu())
    assert output.dtype is MODES[mode].output
    assert set(matrix_products(program)) == {MODES[mode].compute}
    assert torch.allclose(*outputs, atol=0.02 if mode != "32-true" else 1e-6)
    fabric.backward(output.sum())
    assert model.qkv.weight.grad.dtype is torch.float32  # type: ignore[union-attr]
