"""The vendor's kernels beside the reference, on a GPU. Nobody has run these tests yet."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from precision_core import Fabric
from precision_core.testing import PrecisionContract, needs
from precision_te import Delayed, TransformerEnginePrecision, restore

pytestmark = [needs("cuda", capability=(8, 9)), pytest.mark.usefixtures("te")]

# recipe -> least compute capability
RECIPES = {"delayed": (8, 9), "current": (8, 9), "block": (9, 0), "mxfp8": (10, 0), "nvfp4": (10, 0)}


class TestTransformerEngine(PrecisionContract):
    accelerator = "gpu"

    def make_precision(self) -> TransformerEnginePrecision:
        return TransformerEnginePrecision("bf16-mixed", pad=True)


def run(engine: str, recipe: str, x: Tensor) -> list[Tensor]:
    """Returns output and gradients of two linear layers after three steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 128)).cuda()
    plugin = TransformerEnginePrecision("bf16-mixed", engine=engine, recipe=recipe)
    model = Fabric(accelerator="gpu", devices=1, precision=plugin).setup(model)
    for _ in range(3):
        x = x.detach().requires_grad_()
        model.zero_grad()
        output = model(x)
        output.square().mean().backward()
    return [output.detach(), x.grad, *(param.grad for param in model.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("recipe", RECIPES)
def test_forward_and_backward_are_the_references(recipe: str) -> None:
    if torch.cuda.get_device_capability() < RECIPES[recipe]:
        pytest.skip(f"needs compute capability {RECIPES[recipe]}")
    x = torch.randn(64, 256, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    random = recipe == "nvfp4"  # gradients are rounded stochastically
    for mine, theirs in zip(run("reference", recipe, x), run("te", recipe, x), strict=True):
        error = (mine.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < (0.3 if random else 0.02)  # FP8's own error is 0.04, NVFP4's 0.13


def test_amax_histories_are_the_references() -> None:
    x = torch.randn(64, 256, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    states = {}
    for engine in ("reference", "te"):
        torch.manual_seed(0)
        plugin = TransformerEnginePrecision("bf16-mixed", engine=engine, recipe=Delayed(amax_history_len=4))
        model = Fabric(accelerator="gpu", devices=1, precision=plugin).setup(nn.Sequential(nn.Linear(256, 128)).cuda())
        for factor in (1.0, 2.0, 0.5):
            model(x * factor).square().mean().backward()
        states[engine] = model.state_dict()["0._extra_state"].cpu()
    torch.testing.assert_close(states["te"], states["reference"], rtol=0.02, atol=0.0)


def test_a_run_goes_on_from_its_checkpoint_in_either_engine(tmp_path: Any) -> None:
    def start(engine: str) -> tuple[Fabric, nn.Module, SGD]:
        torch.manual_seed(0)
        plugin = TransformerEnginePrecision("bf16-mixed", engine=engine)
        fabric = Fabric(accelerator="gpu", devices=1, precision=plugin)
        model = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 128)).cuda()
        optimizer = SGD(model.parameters(), lr=0.1)
        fabric.setup(model, optimizer)
        return fabric, model, optimizer

    def step(fabric: Fabric, model: nn.Module, optimizer: SGD) -> float:
        x = torch.randn(64, 256, device="cuda", generator=torch.Generator("cuda").manual_seed(2))
        optimizer.zero_grad()
        loss = model(x).square().mean()
        fabric.backward(loss)
        optimizer.step()
        return loss.item()

    fabric, model, optimizer = start("te")
    for _ in range(3):
        step(fabric, model, optimizer)
    fabric.save(tmp_path / "state.ckpt", {"model": model, "optimizer": optimizer})
    expected = step(fabric, model, optimizer)
    fabric, model, optimizer = start("te")
    fabric.load(tmp_path / "state.ckpt", {"model": model, "optimizer": optimizer})
    assert step(fabric, model, optimizer) == expected
    fabric, model, optimizer = start("reference")
    step(fabric, model, optimizer)
    fabric.load(tmp_path / "state.ckpt", {"model": model, "optimizer": optimizer})
    assert step(fabric, model, optimizer) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_a_checkpointed_forward_gives_the_same_gradients(recipe: str) -> None:
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 128)).cuda()
        plugin = TransformerEnginePrecision("bf16-mixed", recipe=recipe)
        plugin.convert_module(model)
        x = torch.randn(64, 256, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).requires_grad_()
        with plugin.forward_context():
            output = plugin.checkpoint(model, x) if checkpointed else model(x)
        output.float().square().mean().backward()
        gradients.append([param.grad for param in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("recipe", ["delayed", "current", "block"])
@pytest.mark.parametrize("fused", [False, True])
def test_microbatches_quantise_weights_once_and_train_the_same(recipe: str, fused: bool) -> None:
    if torch.cuda.get_device_capability() < RECIPES[recipe]:
        pytest.skip(f"needs compute capability {RECIPES[recipe]}")
    results = []
    for told in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 120)).cuda()
        optimizer = AdamW(model.parameters(), lr=1e-3, fused=fused)
        plugin = TransformerEnginePrecision("bf16-mixed", recipe=recipe, pad=True)
        fabric = Fabric(accelerator="gpu", devices=1, precision=plugin)
        fabric.setup(model, optimizer)
        first: Any = model[0]
        generator = torch.Generator("cuda").manual_seed(1)
        for _ in range(3):
            optimizer.zero_grad()
            for number in range(4):
                x = torch.randn(64, 256, device="cuda", generator=generator)
                with fabric.no_backward_sync(model, enabled=told and number < 3):
                    fabric.backward(model(x).float().square().mean())
            optimizer.step()
        assert bool(first._fp8_workspaces) is told  # where the vendor keeps a weight in FP8
        results.append([param.detach().clone() for param in model.parameters()])
    for plain, kept in zip(*results, strict=True):
        # in delayed scaling the scale of a kept weight is that of the first microbatch
        torch.testing.assert_close(kept, plain, rtol=0.0, atol=2e-3 if recipe == "delayed" else 0.0)


def test_ten_steps_wait_for_nothing() -> None:
    for recipe, capability in RECIPES.items():
        if torch.cuda.get_device_capability() < capability:
            continue
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 128)).cuda()
        optimizer = AdamW(model.parameters(), lr=1e-3, fused=True)
        precision = TransformerEnginePrecision("bf16-mixed", recipe=recipe)
        fabric = Fabric(accelerator="gpu", devices=1, precision=precision)
        fabric.setup(model, optimizer)
        x = torch.randn(64, 256, device="cuda")
        for step in range(13):
            if step == 3:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            optimizer.zero_grad()
            fabric.backward(model(x).float().square().mean())
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
        torch.cuda.set_sync_debug_mode("default")


def test_padding_gives_any_shape_and_any_batch() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(30, 50), nn.GELU(), nn.Linear(50, 7)).cuda()
    plugin = TransformerEnginePrecision("bf16-mixed", recipe="current", pad=True)
    model = plugin.convert_module(copy.deepcopy(plain))
    x = torch.randn(3, 5, 30, device="cuda")
    with plugin.forward_context():
        output = model(x)
    assert output.shape == (3, 5, 7)
    assert (output.float() - plain(x)).norm() / plain(x).norm() < 0.1
    output.float().square().mean().backward()
    assert [param.grad.shape for param in model.parameters()] == [param.shape for param in plain.parameters()]  # type: ignore[union-attr]


def test_quantised_weights_take_less_memory_and_come_back() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(256, 256)).cuda()
    plugin = TransformerEnginePrecision("bf16-true", recipe="current", quantized_weights=True)
    model = plugin.convert_module(copy.deepcopy(plain))
    x = torch.randn(16, 256, device="cuda", dtype=torch.bfloat16)
    with plugin.forward_context():
        output = model(x)
    wanted = plain(x.float())
    assert (output.float() - wanted).norm() / wanted.norm() < 0.1
    error = restore(model)[0].weight.float() - plain[0].weight  # type: ignore[index]
    assert 0.0 < error.norm() / plain[0].weight.norm() < 0.05
