"""A set-up model, or a copy of it, that is cast: it runs in what it was cast to."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from precision_core import Fabric
from precision_core.precision.model.default_dtype import created_as

X = torch.linspace(-1, 1, 12).view(3, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.norm(self.first(x)) + torch.full((4,), 0.1))


def make(mode: str) -> Any:
    torch.manual_seed(0)
    return Fabric(accelerator="cpu", precision=mode).setup(Net().eval())


@pytest.mark.parametrize("mode", ["bf16-true", "16-true", "32-true", "64-true", "bf16-true; first: 32-true"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_cast_copy_runs_in_what_it_was_cast_to(mode: str, dtype: torch.dtype) -> None:
    model = make(mode)
    twin = copy.deepcopy(model).to(dtype)
    plain = Net().eval()
    plain.double().load_state_dict(twin.state_dict())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    if "first" in mode:
        tolerance = max(tolerance, 0.01)  # the layers around an exception cast to the policy's dtype
    output = twin(X)
    assert output.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    with created_as(torch.float64):
        exact = plain.double()(X.double())
    assert (output - exact).abs().max() < tolerance
    assert torch.equal(model(X), make(mode)(X))  # the model itself is as it was


def test_the_model_itself_and_back_again() -> None:
    model = make("bf16-true")
    before = model(X)
    assert model.float()(X).dtype is torch.float32 and not torch.equal(model(X), before)  # digits that bfloat16 lacks
    model.to(torch.bfloat16)
    assert torch.allclose(model(X), before, atol=0.02) and "_precision_cast" not in vars(model)
    again = pickle.loads(pickle.dumps(model.float()))
    assert Fabric(accelerator="cpu", precision="bf16-true").setup(again)(X).dtype is torch.float32
    assert again.first.weight.dtype is torch.bfloat16 and "_precision_cast" not in vars(again)


def test_an_average_of_a_half_model_moves_once_it_is_float32() -> None:
    """Its steps are smaller than bfloat16's spacing: as README says, cast the average."""

    def average(cast: bool) -> float:
        model = Fabric(accelerator="cpu", precision="bf16-true").setup(nn.Linear(1, 1, bias=False))
        nn.init.ones_(model.weight)
        ema = AveragedModel(model, avg_fn=get_ema_avg_fn(0.999))
        ema = ema.float() if cast else ema
        ema.update_parameters(model)
        nn.init.constant_(model.weight, 2.0)
        for _ in range(100):
            ema.update_parameters(model)
        return float(ema(torch.ones(1, 1)).detach())

    assert average(cast=True) == pytest.approx(2 - 0.999**100, rel=1e-3)  # torch adds 0.001 * 2 in bfloat16
    assert average(cast=False) == 1.0


def test_torchs_own_averages_of_several_tensors_want_one_dtype() -> None:
    """Which is why README names avg_fn: multi_avg_fn takes no average in float32 of a half model."""
    model = Fabric(accelerator="cpu", precision="bf16-true").setup(nn.Linear(1, 1))
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999)).float()
    ema.update_parameters(model)
    with pytest.raises(RuntimeError):
        ema.update_parameters(model)


def train(mode: str, kind: Any) -> tuple[Fabric, Net, Any]:
    torch.manual_seed(0)
    fabric, model = Fabric(accelerator="cpu", precision=mode), Net()
    _, optimizer = fabric.setup(model, kind(model.parameters(), lr=0.01))

    def step() -> None:
        optimizer.zero_grad()
        fabric.backward(model(X).pow(2).mean())
        optimizer.step()

    return fabric, model, step


@pytest.mark.parametrize("cast", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["bf16-mixed", "16-mixed"])
def test_a_mixed_mode_does_not_train_what_was_cast_since(mode: str, cast: torch.dtype) -> None:
    _, model, step = train(mode, torch.optim.SGD)
    step()
    model.to(cast)
    before = [param.detach().clone() for param in model.parameters()]
    name = str(cast).removeprefix("torch.")
    message = rf"this Net was cast to {name} after fabric\.setup, and {mode} trains float32 parameters: cast it back"
    with pytest.raises(RuntimeError, match=message):
        step()
    assert all(map(torch.equal, before, model.parameters()))
    plain = Net().eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():  # an export, or an evaluation of it
        assert torch.allclose(model.eval()(X).double(), plain(X).double(), atol=0.02)
    model.to(torch.float32).train()
    step()


@pytest.mark.parametrize("mode", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("cast", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_cast_copy_of_a_mixed_model_runs(mode: str, cast: torch.dtype) -> None:
    _, model, step = train(mode, torch.optim.SGD)
    twin = copy.deepcopy(model).to(cast)
    assert (twin(X) - model(X)).abs().max() < 0.05
    step()
    assert all(param.dtype is cast for param in twin.parameters())


@pytest.mark.parametrize(
    ("mode", "cast", "state"),
    [("32-true", torch.float16, "float32"), ("bf16-true", torch.float32, "bfloat16")],
    ids=str,
)
def test_a_true_mode_does_not_step_with_state_of_another_dtype(mode: str, cast: torch.dtype, state: str) -> None:
    _, model, step = train(mode, torch.optim.AdamW)
    step()
    model.to(cast)
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(RuntimeError, match=f"and AdamW's state is in {state}: cast it back"):
        step()
    assert all(map(torch.equal, before, model.parameters()))
    _, model, step = train(mode, torch.optim.AdamW)
    model.to(cast)
    step()  # there was no state yet
    assert model.first.weight.dtype is cast


class Head(nn.Module):
    """A model whose parts lie deeper than the root."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


CASTS = {
    "a layer": lambda model: model.head.half(),
    "a part": lambda model: model.body.to(torch.float16),
    "data": lambda model: setattr(model.head.weight, "data", model.head.weight.data.half()),
}


def step_of(fabric: Fabric, model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    fabric.backward(model(X).pow(2).mean())
    optimizer.step()


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_mixed_mode_does_not_train_a_part_that_was_cast_since(steps: int, cast: str) -> None:
    fabric, model = Fabric(accelerator="cpu", precision="bf16-mixed"), Head()
    _, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(steps):
        step_of(fabric, model, optimizer)
    CASTS[cast](model)
    before = [param.detach().clone() for param in model.parameters()]
    name = "body.0.weight" if cast == "a part" else "head.weight"
    message = rf"^{name} \(float16\).* cast after fabric\.setup, which left float32 for bf16-mixed"
    with pytest.raises(RuntimeError, match=message) as info:
        step_of(fabric, model, optimizer)
    assert f'precision="bf16-mixed; {name.removesuffix(".weight")}: 16-true")' in str(info.value)
    assert all(map(torch.equal, before, model.parameters()))
    with torch.no_grad():
        if cast != "a part":  # whose norm torch does not run on what autocast gives it
            assert model(X).dtype is torch.float32
    model.to(torch.float32)
    step_of(fabric, model, optimizer)
    Fabric(accelerator="cpu", precision=str(info.value).split('"')[1]).setup(Head())  # what the message advises


def test_a_frozen_part_may_be_cast_and_is_named_once_it_trains() -> None:
    fabric, model = Fabric(accelerator="cpu", precision="bf16-mixed"), Head()
    model.head.requires_grad_(False)
    _, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model.head.half()
    step_of(fabric, model, optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    step_of(fabric, model, optimizer)
    model.head.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"head\.weight \(float16\), head\.bias \(float16\) were cast"):
        step_of(fabric, model, optimizer)


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [("32-true", torch.float16), ("bf16-true", torch.float16), ("64-true", torch.float32), ("16-true", torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("part", ["head", "body"])
def test_a_true_mode_names_the_part_that_its_forward_fails_of(mode: str, dtype: torch.dtype, part: str) -> None:
    model = Fabric(accelerator="cpu", precision=mode).setup(Head())
    before = model(X)
    getattr(model, part).to(dtype)
    was, name = str(model.body[0].weight.dtype if part == "head" else model.head.weight.dtype), str(dtype)
    was, name = was.removeprefix("torch."), name.removeprefix("torch.")
    first = "head.weight" if part == "head" else "body.0.weight"
    message = rf"^{first} \({name}\).* cast after fabric\.setup, which left {was} for {mode}"
    with pytest.raises(RuntimeError, match=message):
        model(X)
    getattr(model, part).to(getattr(torch, was))
    assert torch.allclose(model(X), before, atol=0.02)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(X[:, :2])


def test_state_of_a_part_that_a_true_mode_has_cast_since() -> None:
    fabric, model = Fabric(accelerator="cpu", precision="bf16-true; body.1: 32-true"), Head()
    _, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    step_of(fabric, model, optimizer)
    model.body[1].bfloat16()
    with pytest.raises(RuntimeError, match=r"^body\.1\.weight \(bfloat16\).* which left float32 for bf16-true"):
        step_of(fabric, model, optimizer)
