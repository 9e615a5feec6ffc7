"""The reference on a GPU: its contracts, values as on a CPU, and no wait for the device. Nobody has run these yet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from precision_core import Fabric
from precision_core.testing import PrecisionContract, needs
from precision_te import TransformerEnginePrecision
from precision_te.recipes import RECIPES

pytestmark = needs("cuda")
DEVICE = "cuda"


@pytest.mark.parametrize("recipe", RECIPES, scope="class")
class TestReference(PrecisionContract):
    accelerator = DEVICE

    @pytest.fixture(autouse=True)
    def _set_recipe(self, recipe: str) -> None:
        self.recipe = recipe

    def make_precision(self) -> TransformerEnginePrecision:
        to_nearest = {"disable_stochastic_rounding": True} if self.recipe == "nvfp4" else {}
        recipe = {"recipe": self.recipe, **to_nearest}
        return TransformerEnginePrecision("bf16-mixed", engine="reference", recipe=recipe)

    def make_fabric(self) -> Fabric:
        return Fabric(self.accelerator, devices=1, precision=self.make_precision())


def gradients(recipe: str, device: str, steps: int = 3) -> list[Tensor]:
    """Returns output and gradients, on the CPU, of the last of some steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 32))
    precision = TransformerEnginePrecision("32-true", engine="reference", recipe=recipe)
    model = Fabric(device, devices=1, precision=precision).setup(model)
    x = torch.randn(48, 64, generator=torch.Generator().manual_seed(1)).to(device)
    for _ in range(steps):
        model.zero_grad()
        output = model(x)
        output.square().mean().backward()
    return [output.detach().cpu(), *(param.grad.cpu() for param in model.parameters())]  # type: ignore[union-attr]


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "nvfp4"])  # which rounds stochastically
def test_values_are_those_of_a_cpu(recipe: str) -> None:
    for one, other in zip(gradients(recipe, DEVICE), gradients(recipe, "cpu"), strict=True):
        assert (one - other).norm() / other.norm() < 0.01  # FP8's own error is 0.04; sums differ in float32's last bits


@pytest.mark.parametrize("recipe", RECIPES)
def test_ten_steps_wait_for_nothing(recipe: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 32))
    optimizer = AdamW(model.parameters(), lr=1e-3, fused=True)
    precision = TransformerEnginePrecision("bf16-mixed", engine="reference", recipe=recipe)
    fabric = Fabric(DEVICE, devices=1, precision=precision)
    fabric.setup(model, optimizer)
    x = torch.randn(48, 64).to(fabric.device)
    for step in range(13):
        if step == 3:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        optimizer.zero_grad()
        fabric.backward(model(x).float().square().mean())
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
