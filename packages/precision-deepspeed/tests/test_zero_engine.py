"""What belongs to one step under ZeRO stays in it: gradients that were dropped, skipped, or not given this time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precision_core import Fabric
from precision_core.testing import run_in_ranks
from precision_deepspeed import DeepSpeedStrategy
from precision_deepspeed.vendor import gathered

Give = Callable[[int, float], None]
RATE = 0.1


class Choice(nn.Module):
    """Two layers of the same shape, of which a forward takes one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))
        self.last = nn.Linear(4, 1, bias=False)

    def forward(self, x: Tensor, which: int) -> Tensor:
        return self.last(self.layers[which](x))


def rows(rank: int) -> Tensor:
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(rank))


def dropped(give: Give, optimizer: Any) -> None:
    give(0, 100.0)
    optimizer.zero_grad()
    give(1, 1.0)
    optimizer.step()


def left_out_this_time(give: Give, optimizer: Any) -> None:
    for which in (0, 1, 0, 1):
        give(which, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def late_in_the_accumulation(give: Give, optimizer: Any) -> None:
    for _ in range(2):
        give(0, 1.0)
        give(1, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def skipped_and_left_out(give: Give, optimizer: Any) -> None:
    give(0, float("inf"))
    optimizer.step()
    give(1, 1.0)
    optimizer.step()


def dropped_late(give: Give, optimizer: Any) -> None:
    left_out_this_time(give, optimizer)
    give(1, 100.0)
    give(0, 100.0)
    dropped(give, optimizer)
    optimizer.zero_grad()
    late_in_the_accumulation(give, optimizer)


LOOPS = (dropped, left_out_this_time, late_in_the_accumulation, skipped_and_left_out, dropped_late)


def by_hand(loop: Callable[[Give, Any], None]) -> list[float]:
    """Returns the parameters after `loop` in float64, where a step that is not finite is left out."""
    model = Choice().double()

    class Skipping(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            grads = [param.grad for param in model.parameters() if param.grad is not None]
            if all(bool(torch.isfinite(grad).all()) for grad in grads):
                super().step()
            else:
                self.zero_grad()

    def give(which: int, factor: float) -> None:
        for rank in range(2):
            (model(rows(rank).double(), which).pow(2).mean() / 2 * factor).backward()

    loop(give, Skipping(model.parameters(), lr=RATE))
    return [value for param in model.parameters() for value in param.detach().reshape(-1).tolist()]


def by_zero(stage: int, mode: str, config: dict[str, Any], offloads: bool) -> list[list[float]]:
    def after(loop: Callable[[Give, Any], None]) -> list[float]:
        model = Choice()
        strategy = DeepSpeedStrategy(stage, config, offload_optimizer=offloads)
        fabric = Fabric(accelerator="cpu", strategy=strategy, precision=mode)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        fabric.setup(model, optimizer)

        def give(which: int, factor: float) -> None:
            fabric.backward(model(rows(fabric.global_rank), which).float().pow(2).mean() * factor)

        loop(give, optimizer)
        with gathered(list(model.parameters()), writes=False):
            values = [value for param in model.parameters() for value in param.detach().float().reshape(-1).tolist()]
        fabric.teardown()
        return values

    return [after(loop) for loop in LOOPS]


def labelled(loop: Callable[[Give, Any], None]) -> Callable[[str], str]:
    return lambda message: f"{loop.__name__}: {message}"


@pytest.mark.parametrize("offloads", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_of_one_step_are_no_part_of_the_next(stage: int, offloads: bool) -> None:
    for values in run_in_ranks(2, by_zero, stage, "32-true", {}, offloads):
        for loop, mine in zip(LOOPS, values, strict=True):
            torch.testing.assert_close(mine, by_hand(loop), rtol=1e-5, atol=1e-6, msg=labelled(loop))


@pytest.mark.parametrize(("stage", "offloads"), [(2, False), (2, True), (3, False)])
def test_also_where_half_gradients_accumulate_in_float32(stage: int, offloads: bool) -> None:
    config = {"data_types": {"grad_accum_dtype": "fp32"}}
    for values in run_in_ranks(2, by_zero, stage, "bf16-true", config, offloads):
        for loop, mine in zip(LOOPS, values, strict=True):
            torch.testing.assert_close(mine, by_hand(loop), rtol=0.0, atol=0.01, msg=labelled(loop))
