"""A loss that is not finite ten steps in a row: one warning, at the tenth, in every mode that skips no steps."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from precision_core import Fabric, Policy, Precision, SingleDeviceStrategy
from precision_core.precision.loss_watch import LossWatch

NAN, INF = math.nan, math.inf


def run(mode: str, losses: list[list[float]], set_up: bool = True) -> list[int]:
    """Returns the steps in which a warning came; each step has the losses of its accumulation."""
    fabric = Fabric(accelerator="cpu", precision=mode)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    fabric.setup(model, optimizer) if set_up else fabric.setup(model)
    said = []
    for step, parts in enumerate(losses, 1):
        for value in parts:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                fabric.backward(model(torch.ones(1, 1)).sum() * 0 + value)
            said += [step for each in caught if "the loss was inf or NaN in 10 steps in a row" in str(each.message)]
            assert all(mode.partition(";")[0] in str(each.message) for each in caught)
        optimizer.step()
    return said


def test_the_mode_is_the_one_that_the_strategy_made_of_it() -> None:
    class Narrows(SingleDeviceStrategy):
        def connect(self, precision: Precision) -> None:
            precision.policy = Policy.parse("params=float32,output=bfloat16")
            super().connect(precision)

    fabric = Fabric(strategy=Narrows("cpu"), precision="32-true")
    param = nn.Parameter(torch.ones(()))
    with pytest.warns(UserWarning, match=r"output=bfloat16,\S+ skips no such step"):
        for _ in range(10):
            fabric.backward(param * NAN)


@pytest.mark.parametrize("mode", ["32-true", "64-true", "bf16-true", "16-true", "bf16-mixed"])
def test_ten_in_a_row_are_said_once(mode: str) -> None:
    assert run(mode, [[NAN]] * 25) == [10]


def test_a_finite_step_begins_anew_and_an_accumulation_is_one_step() -> None:
    assert run("bf16-mixed", [[NAN]] * 9 + [[1.0]] + [[INF]] * 9 + [[1.0]]) == []
    assert run("bf16-mixed", [[1.0]] * 3 + [[INF]] * 4 + [[-INF]] * 6 + [[1.0]]) == [13]
    assert run("bf16-mixed", [[1.0, NAN, 1.0]] * 9 + [[1.0] * 3]) == []
    assert run("bf16-mixed", [[1.0, NAN, NAN]] * 10) == [10]
    assert run("bf16-mixed", [[NAN, NAN]] * 5, set_up=False) == [5]  # nobody says where a step ends


def test_scaled_modes_count_skipped_steps_instead() -> None:
    assert run("16-mixed", [[NAN]] * 12) == []


def test_values_of_several_numbers_and_given_gradients_are_left_alone() -> None:
    fabric = Fabric(accelerator="cpu")
    model = fabric.setup(nn.Linear(1, 1))
    for _ in range(12):
        fabric.backward(model(torch.ones(2, 1)) * NAN, torch.ones(2, 1))


def test_losses_of_a_device_are_compared_there_and_counted_when_they_arrive() -> None:
    watch = LossWatch("bf16-mixed")
    for step, value in enumerate([1.0, NAN, INF, 2.0, NAN] + [NAN] * 15):
        watch._waiting.append((step, torch.tensor(value, dtype=torch.bfloat16 if step % 2 else torch.float32)))
    watch._arriving = (*watch._compare(), None)
    assert watch._arriving[1].tolist() == [True, False, False, True] + [False] * 16 and not watch._waiting
    with pytest.warns(UserWarning, match="10 steps in a row. bf16-mixed skips no such step"):
        watch._read()
    assert watch._arriving is None and watch._last == 13  # it stops there
