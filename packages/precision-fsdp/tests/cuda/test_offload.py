"""`cpu_offload`, models on meta, and models that a file fills, on a GPU. Nobody has run these tests yet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from precision_core import Fabric
from precision_core.testing import needs
from precision_fsdp import FSDPStrategy

pytestmark = needs("cuda")
DEVICE = "cuda"


class Block(nn.Module):
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.layer = nn.Linear(32, 32)
        self.register_buffer("table", torch.empty(32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.table = torch.arange(32) / 32  # exact in bfloat16

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(self.norm(x)) + self.table


def make() -> nn.Module:
    return nn.Sequential(*(Block() for _ in range(3)), nn.Linear(32, 8))


def build(fabric: Fabric, on_meta: bool, empty_init: bool = False) -> nn.Module:
    torch.manual_seed(0)
    if not on_meta:
        return fabric.setup(make())
    with fabric.init_module(empty_init=empty_init):
        model = make()
    return fabric.setup(model)


def train(fabric: Fabric, model: nn.Module) -> list[float]:
    optimizer = fabric.setup_optimizers(AdamW(model.parameters(), lr=1e-2))
    losses = []
    for _ in range(5):
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(1)).to(fabric.device)
        optimizer.zero_grad()
        loss = model(x).float().square().mean()
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.to_local().cpu().clone() for name, value in model.named_parameters()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", ["32-true", "bf16-mixed", "bf16-true"])
def test_offloaded_models_train_like_those_on_the_device(mode: str) -> None:
    curves = []
    for offload in (False, True):
        for on_meta in (False, True):
            fabric = Fabric(DEVICE, FSDPStrategy(cpu_offload=offload, wrap=Block), devices=1, precision=mode)
            model = build(fabric, on_meta)
            where: set[Any] = {param.to_local().device.type for param in model.parameters()}  # type: ignore[attr-defined]
            assert where == {"cpu" if offload else DEVICE}
            assert {buffer.device.type for buffer in model.buffers()} == {DEVICE}
            curves.append(train(fabric, model))
            fabric.teardown()
    assert curves[0][-1] < curves[0][0]
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5 if mode == "32-true" else 2e-2)


@pytest.mark.parametrize("backend", [None, "nccl"])
def test_values_on_meta_are_those_of_ordinary_construction(backend: str | None) -> None:
    torch.manual_seed(0)
    expected = dict(make().named_parameters())
    fabric = Fabric(DEVICE, FSDPStrategy(backend=backend, wrap=Block), devices=1)
    for name, value in values(build(fabric, on_meta=True)).items():
        assert torch.equal(value, expected[name]), name
    fabric.teardown()


@pytest.mark.parametrize("offload", [False, True])
def test_a_file_fills_the_shards_and_nothing_is_drawn(offload: bool, tmp_path: Path) -> None:
    fabric = Fabric(DEVICE, FSDPStrategy(cpu_offload=offload), devices=1)
    wanted = build(fabric, on_meta=False)
    fabric.save_module(tmp_path / "m.safetensors", wanted)
    state = torch.get_rng_state(), torch.cuda.get_rng_state() if DEVICE == "cuda" else None
    with fabric.init_module(empty_init=True):
        model = make()
    model = fabric.setup(model)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert state[1] is None or torch.equal(torch.cuda.get_rng_state(), state[1])
    with pytest.raises(RuntimeError, match="have no values"):
        model(torch.ones(1, 32, device=fabric.device))
    fabric.load_module(tmp_path / "m.safetensors", model)
    found = values(model)
    assert all(torch.equal(value, found[name]) for name, value in values(wanted).items())
    fabric.teardown()


@pytest.mark.parametrize("load", [True, False])
def test_an_offloaded_run_goes_on_from_its_checkpoint(load: bool, tmp_path: Path) -> None:
    losses: list[float] = []
    step: Callable[[], float]
    for part in range(2):
        fabric = Fabric(DEVICE, FSDPStrategy(cpu_offload=True), devices=1, precision="bf16-mixed")
        torch.manual_seed(0)
        model = make()
        optimizer = AdamW(model.parameters(), lr=1e-2)
        fabric.setup(model, optimizer)
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(1)).to(fabric.device)

        def step(fabric: Fabric = fabric, model: Any = model, optimizer: Any = optimizer, x: Tensor = x) -> float:
            optimizer.zero_grad()
            loss = model(x).float().square().mean()
            fabric.backward(loss)
            optimizer.step()
            return float(loss.item())

        if part == 0:
            step(), step()
            fabric.save(tmp_path / "c", {"model": model, "optimizer": optimizer})
        elif load:
            fabric.load(tmp_path / "c", {"model": model, "optimizer": optimizer})
        losses.append(step())
        fabric.teardown()
    assert (losses[0] == losses[1]) is load
