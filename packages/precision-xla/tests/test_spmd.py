"""Two virtual devices that SPMD makes one. In a process of its own, which test_devices.py starts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from precision_core import Fabric
from precision_core.testing import Net, Problem, curve_distance, loss_bound, loss_of, make_batch, train
from precision_xla import XLAPrecision, XLAStrategy, vendor
from precision_xla.support import RUNS as MODES

pytestmark = pytest.mark.skipif(
    os.environ.get("CPU_NUM_DEVICES") != "2", reason="runs in a process started with CPU_NUM_DEVICES=2"
)


def fabric_of(mode: str = "bf16-mixed", **options: bool) -> Fabric:
    return Fabric(accelerator="cpu", strategy=XLAStrategy(**options), precision=mode, devices=2)


def test_the_documented_usage_shards_the_users_own_parameters_and_the_batch() -> None:
    fabric = Fabric(accelerator="cpu", strategy="xla", precision=XLAPrecision(precision="bf16-mixed"), devices=2)
    assert fabric.launch() is None and fabric.world_size == 1 and vendor.device_count() == 2
    torch.manual_seed(0)
    model = Net()
    keys, optimizer = list(model.state_dict()), torch.optim.AdamW(model.parameters(), lr=0.01)
    assert fabric.setup(model, optimizer)[0] is model and type(model) is Net and list(model.state_dict()) == keys
    assert type(model.head.weight) is nn.Parameter and model.head.weight is model.embedding.weight
    assert vendor.sharding(model.head.weight) == "{devices=[2,1]0,1}"
    loader = fabric.setup_dataloaders([make_batch(step) for step in range(20)])
    losses = []
    for step, (batch, target) in enumerate(loader):
        assert vendor.sharding(batch["ids"]) == "{devices=[2,1]0,1}" and batch["ids"].shape == (8, 8)
        if step == 10:
            before = vendor.counts()
        optimizer.zero_grad()
        loss = loss_of(model(batch), target)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        losses.append(loss)
    done = vendor.counts() - before
    assert (done.compilations, done.reads) == (0, 0) and done.executions == 10
    assert losses[-1].item() < losses[0].item()
    moments = optimizer.state[model.head.weight]["exp_avg"]
    assert vendor.sharding(moments) == vendor.sharding(model.head.weight) == "{devices=[2,1]0,1}"


@pytest.mark.parametrize("mode", MODES)
def test_curves_are_those_of_one_device(mode: str, problem_of: Callable[[str], Problem]) -> None:
    alone = train(Fabric(accelerator="cpu", precision=mode), problem_of(mode), steps=20)
    assert curve_distance(train(fabric_of(mode), problem_of(mode), steps=20), alone) <= loss_bound(mode, 20)


@pytest.mark.parametrize("factor", [2.0, 0.5], ids=["summed", "halved"])
def test_gradients_of_another_size_are_beyond_the_bound(factor: float) -> None:
    alone = train(Fabric(accelerator="cpu", precision="32-true"), steps=20)
    wrong = train(fabric_of("32-true"), steps=20, gradient_factor=factor)
    assert curve_distance(wrong, alone) > loss_bound("32-true", 20)


@pytest.mark.parametrize("shard_parameters", [True, False])
def test_partial_sums_of_bfloat16_gradients_are_added_in_float32(shard_parameters: bool) -> None:
    """4 + 3/256 is 4 in bfloat16, and with the other device's 1/128 it would stay so; the sum rounds to 4 + 1/32."""
    fabric = fabric_of("bf16-mixed", shard_parameters=shard_parameters)
    model = fabric.setup(nn.Linear(4, 2, bias=False))
    rows = torch.tensor([4.0, 3 / 256, 1 / 128, 0.0]).view(4, 1).expand(4, 4).contiguous()
    fabric.backward(model(rows.to(fabric.device)).sum())
    assert torch.equal(model.weight.grad.cpu(), torch.full((2, 4), 4 + 1 / 32))
    assert (vendor.sharding(model.weight) == "{devices=[2,1]0,1}") is shard_parameters


def test_batches_that_do_not_divide_and_parameters_that_do_not_are_right_too() -> None:
    fabric = fabric_of("32-true")
    torch.manual_seed(0)
    model, x = nn.Linear(3, 5), torch.randn(5, 3)
    expected = model(x).detach()
    (loaded,) = fabric.setup_dataloaders(DataLoader(x, batch_size=5))  # type: ignore[arg-type]
    model = fabric.setup(model)
    assert torch.allclose(model(loaded).cpu(), expected, atol=1e-6)
    assert torch.allclose(model(x.to(fabric.device)).cpu(), expected, atol=1e-6)


def test_checkpoints_are_whole_and_load_into_shards(tmp_path: Path) -> None:
    runs = []
    for load in (False, True):
        Fabric.seed_everything(5)
        fabric, model = fabric_of(), Net(seed=int(load))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        fabric.setup(model, optimizer)
        batch, target = make_batch(0, device=fabric.device)
        if load:
            fabric.load(tmp_path / "x.ckpt", {"model": model, "optimizer": optimizer})
        for step in range(4):
            if step == 2 and not load:
                fabric.save(tmp_path / "x.ckpt", {"model": model, "optimizer": optimizer})
            if step >= 2 or not load:
                optimizer.zero_grad()
                fabric.backward(loss_of(model(batch), target))
                optimizer.step()
        runs.append(model.head.weight.detach().cpu())
    assert torch.equal(*runs)
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["model"]["head.weight"]
    assert saved.is_cpu and saved.shape == (32, 32)


def test_all_devices_or_none() -> None:
    with pytest.raises(
        ValueError, match="the XLA runtime of this process has started with 2 CPU devices, and stays so"
    ):
        Fabric(accelerator="cpu", strategy="xla", devices=4)
    with pytest.raises(ValueError, match=r"Fabric\(devices=\[1\]\): XLA's devices are taken from the first on"):
        Fabric(accelerator="cpu", strategy="xla", devices=[1])
