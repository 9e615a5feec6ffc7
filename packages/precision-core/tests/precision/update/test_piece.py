"""Piece: what is stepped as it is and what is cut give the same values, and state that the optimizer made stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from precision_core import HalfPrecision
from precision_core.precision.update import rows
from precision_core.testing.stored import FORMS, OPTIMIZERS, equal, masters

MODES = ["bf16-master", "16-master", "bf16-stochastic", "params=bfloat16,master=float32,state=bfloat16"]
ALL = OPTIMIZERS | FORMS
FAST = ["AdamW fused", "SGD momentum", "NAdam foreach", "Rprop"]


@pytest.fixture
def as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has all parameters stepped in one batch."""
    monkeypatch.setattr(rows, "_BYTES", 1000.0)


def model() -> nn.ParameterList:
    torch.manual_seed(0)
    shapes = [(6, 11), (5,), (), (2, 3, 3, 2), (20, 10)] * 2
    made = nn.ParameterList(nn.Parameter(torch.randn(shape) * 0.1) for shape in shapes)
    made[3].data = made[3].data.to(memory_format=torch.channels_last)
    return made


def give_gradients(params: nn.ParameterList, seed: int) -> None:
    torch.manual_seed(seed)
    for param in params:
        param.grad = torch.empty_like(param).copy_(torch.randn(param.shape).bfloat16())


def stepped(mode: str, name: str, steps: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the values after some steps, and all state."""
    precision, half = HalfPrecision(mode), model()
    precision.convert_module(half)
    optimizer = ALL[name](half)
    precision.register_optimizers(optimizer)
    updates = precision._updates
    assert updates is not None
    for step in range(steps):
        give_gradients(half, step)
        with updates.stepping(optimizer):
            optimizer.step()
    held = optimizer.state_dict()["state"]
    state = [torch.as_tensor(value) for _, entry in sorted(held.items()) for _, value in sorted(entry.items())]
    return masters(precision, half), state


FORM = pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.full) for name in ALL]
)


@FORM
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("as_they_are")
def test_how_parameters_are_cut_changes_nothing(mode: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    cut = rows.Rows.cut
    monkeypatch.setattr(rows.Rows, "cut", lambda *given: [seen.append(len(given[1])), cut(*given)][1])
    whole = stepped(mode, name)
    assert set(seen) <= {10} and (seen or name.startswith(("Adafactor", "Muon")))
    seen.clear()
    monkeypatch.setattr(rows, "LARGEST", 64)
    for one, other in zip(whole, stepped(mode, name), strict=True):
        assert equal(one, other)
    assert max(seen, default=0) < 10


@FORM
@pytest.mark.usefixtures("as_they_are")
def test_what_is_stepped_as_it_is_equals_float32(name: str) -> None:
    wide = model()
    optimizer = ALL[name](wide)
    for step in range(3):
        give_gradients(wide, step)
        optimizer.step()
    assert equal(stepped("bf16-master", name)[0], [param.detach() for param in wide])


@pytest.mark.usefixtures("as_they_are")
def test_state_that_the_optimizer_made_stays_where_it_is() -> None:
    half = model()
    precision = HalfPrecision("bf16-master")
    precision.convert_module(half)
    optimizer, before = AdamW(half), list[int]()
    for step in range(2):
        give_gradients(half, step)
        precision.optimizer_step(optimizer, half, None)
        moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        places = [moment.data_ptr() for moment in moments]
        assert before in ([], places)
        before = places
    for param, state in optimizer.state.items():
        for key in ("exp_avg", "exp_avg_sq"):
            assert (state[key].shape, state[key].stride()) == (param.shape, param.stride())
            assert state[key].untyped_storage().nbytes() == 4 * param.numel()
