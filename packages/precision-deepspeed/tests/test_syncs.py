"""What makes the host wait for a GPU: values that are read from tensors, and timers that synchronise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from precision_core import Fabric
from precision_core.testing import run_in_ranks
from precision_deepspeed import DeepSpeedStrategy


class Reads(TorchDispatchMode):
    """Counts what the host reads of tensors: `item()`, `bool()`, `if tensor:`, and shapes that depend on values."""

    KINDS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.overloadpacket in self.KINDS
        return function(*args, **(kwargs or {}))


def layers(count: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(count)))


def reads(stage: int, mode: str, count: int, **clip: float) -> int:
    """Returns how many values a step reads, of a model of so many layers, each of which has two parameters."""
    fabric = Fabric(accelerator="cpu", strategy=DeepSpeedStrategy(stage), precision=mode)
    model = layers(count)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # AdamW reads its own step counts, which lie on the CPU
    fabric.setup(model, optimizer)
    found = []
    for _ in range(2):  # the first one makes buffers
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().mean()
        fabric.backward(loss)
        with Reads() as counted:
            if clip:
                fabric.clip_gradients(model, optimizer, **clip)  # type: ignore[arg-type]
            optimizer.step()
        found.append(counted.count)
    fabric.teardown()
    return found[-1]


def reads_of(stage: int, mode: str, clip: dict[str, float]) -> list[int]:
    return [reads(stage, mode, count, **clip) for count in (2, 10)]


def test_a_step_of_stage_0_reads_one_value_however_many_parameters() -> None:
    assert run_in_ranks(1, reads_of, 0, "16-mixed", {}) == [[1, 1]]
    assert run_in_ranks(1, reads_of, 0, "bf16-mixed", {}) == [[0, 0]]


@pytest.mark.parametrize(("stage", "mode"), [(0, "16-mixed"), (1, "32-true"), (2, "16-mixed")])
def test_clipping_by_value_reads_as_much_of_ten_layers_as_of_two(stage: int, mode: str) -> None:
    ((two, ten),) = run_in_ranks(1, reads_of, stage, mode, {"clip_val": 0.1})
    assert two == ten


def overflow_in_one_layer(stage: int) -> list[Any]:
    """Returns whether a step was skipped of which the gradients of one layer alone overflow, and what it changed."""
    fabric = Fabric(accelerator="cpu", strategy=DeepSpeedStrategy(stage), precision="16-mixed")
    model = layers(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    before = [param.detach().clone() for param in model.parameters()]
    hook = model[1].weight.register_hook(lambda gradient: gradient * float("inf"))
    fabric.backward(model(torch.ones(2, 4)).square().mean())
    hook.remove()
    fabric.clip_gradients(model, optimizer, clip_val=0.1)
    optimizer.step()
    changed = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    skipped = fabric.last_step_skipped
    fabric.teardown()
    return [skipped, changed]


@pytest.mark.parametrize("stage", [0, 2])
def test_one_layer_that_overflows_skips_the_step_clipped_or_not(stage: int) -> None:
    assert run_in_ranks(1, overflow_in_one_layer, stage) == [[True, [False] * 6]]


def waits(config: dict[str, Any]) -> list[int]:
    """Returns, of each of four steps, how often DeepSpeed had the host wait for all that the device computes."""
    from deepspeed.accelerator import get_accelerator

    fabric = Fabric(accelerator="cpu", strategy=DeepSpeedStrategy(2, config))
    model = layers(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    kind = type(get_accelerator())
    synchronize, counts = kind.synchronize, [0]

    def counted(self: Any, *args: Any) -> Any:
        counts[-1] += 1
        return synchronize(self, *args)

    kind.synchronize = counted
    try:
        for _ in range(4):
            optimizer.zero_grad()
            fabric.backward(model(torch.ones(2, 4)).square().mean())
            optimizer.step()
            counts.append(0)
    finally:
        kind.synchronize = synchronize
        fabric.teardown()
    return counts[:-1]


def all_waits() -> list[list[int]]:
    return [waits(config) for config in ({}, {"timers": {}}, {"timers": {"throughput": {"enabled": True}}})]


def test_no_timer_waits_for_the_device_unless_the_config_asks_for_it() -> None:
    ((none, empty, asked),) = run_in_ranks(1, all_waits)
    assert none == empty == [0, 0, 0, 0]
    assert asked == [0, 0, 2, 2]  # from its third step on, before the forward and after the step
