"""What has no path on the CPU: streams of DeepSpeed's own, pinned memory that it offloads to, and waits of the host."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from precision_core import Fabric
from precision_core.testing import Net, loss_of, make_batch, needs
from precision_deepspeed import DeepSpeedStrategy

pytestmark = needs("cuda")

STEPS = 10
OVERLAP: dict[str, Any] = {"zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 2048}}


def trained(strategy: DeepSpeedStrategy, mode: str, accumulate: int = 2) -> tuple[list[Tensor], list[float]]:
    """Returns the parameters and the clipped norms of five steps, each of so many backwards."""
    fabric = Fabric("gpu", strategy, devices=1, precision=mode)
    model = Net()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    fabric.setup(model, optimizer)
    norms = []
    for step in range(5):
        optimizer.zero_grad()
        for part in range(accumulate):
            batch, target = make_batch(10 * step + part, device=fabric.device)
            fabric.backward(loss_of(model(batch), target) / accumulate)
        norm = fabric.clip_gradients(model, optimizer, max_norm=0.5)
        assert norm is not None
        norms.append(norm.item())
        optimizer.step()
    with fabric.strategy.gathered(model):
        values = [param.detach().float().clone() for param in model.parameters()]
    fabric.teardown()
    return values, norms


@pytest.mark.parametrize("mode", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("variant", ["overlap", "offload"])
def test_overlap_and_offload_train_as_without(stage: int, mode: str, variant: str) -> None:
    if variant == "overlap":
        other = DeepSpeedStrategy(stage, OVERLAP)
    else:
        other = DeepSpeedStrategy(stage, offload_optimizer=True, offload_parameters=stage == 3)
    values, norms = trained(DeepSpeedStrategy(stage), mode)
    theirs, their_norms = trained(other, mode)
    tolerance = 1e-4 if mode == "32-true" else 1e-2
    assert their_norms == pytest.approx(norms, rel=tolerance)
    for mine, each in zip(values, theirs, strict=True):
        torch.testing.assert_close(each, mine, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_model_and_its_batches_are_on_the_device_of_the_rank(stage: int) -> None:
    fabric = Fabric("gpu", DeepSpeedStrategy(stage), devices=[0], precision="bf16-mixed")
    model = Net()
    fabric.setup(model, AdamW(model.parameters(), lr=1e-3))
    batch, _ = make_batch(0, device=fabric.device)
    assert model(batch).device == fabric.device == torch.device("cuda:0")
    assert {buffer.device for buffer in model.buffers()} == {fabric.device}
    fabric.teardown()


def test_a_model_that_is_made_in_shards_is_on_the_device() -> None:
    fabric = Fabric("gpu", DeepSpeedStrategy(3), devices=1, precision="bf16-mixed")
    with fabric.init_module():
        model: nn.Module = Net()
    fabric.setup(model, AdamW(model.parameters(), lr=1e-3))
    batch, target = make_batch(0, device=fabric.device)
    fabric.backward(loss_of(model(batch), target))
    fabric.teardown()


# -------------------------------------------------------------------- waits


@pytest.fixture(autouse=True)
def _quiet_again() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def waits(stage: int, mode: str) -> float:
    """Returns how often the host waits for the GPU in a step, over ten steps."""
    fabric = Fabric("gpu", DeepSpeedStrategy(stage), devices=1, precision=mode)
    model = Net()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    fabric.setup(model, optimizer)
    batches = [make_batch(step, device=fabric.device) for step in range(3 + STEPS)]

    def step(batch: dict[str, Tensor], target: Tensor) -> None:
        optimizer.zero_grad()
        fabric.backward(loss_of(model(batch), target))
        optimizer.step()

    for each in batches[:3]:
        step(*each)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for each in batches[3:]:
            step(*each)
        torch.cuda.set_sync_debug_mode("default")
    fabric.teardown()
    return sum("synchronizing CUDA operation" in str(each.message) for each in caught) / STEPS


@pytest.mark.parametrize(("mode", "most"), [("32-true", 0), ("bf16-mixed", 0), ("16-mixed", 1)])
def test_a_step_of_stage_0_waits_at_most_once(mode: str, most: int) -> None:
    assert waits(0, mode) <= most


@pytest.mark.parametrize("mode", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_under_zero_waits_a_number_of_times_that_no_parameter_adds_to(stage: int, mode: str) -> None:
    """DeepSpeed reads whether gradients are finite, and their norm."""
    assert waits(stage, mode) < len(list(Net().parameters()))
