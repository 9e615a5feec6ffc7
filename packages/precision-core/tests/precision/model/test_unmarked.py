"""Methods other than forward under mixed modes: said once a class, and never for what runs in the mode."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precision_core import Fabric
from precision_core.precision.model.unmarked import is_watched, methods

X = torch.ones(3, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)

    def training_step(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        self.seen.append(out.dtype)
        return out.sum()

    def through_forward(self, x: Tensor) -> Tensor:
        return self(x).sum()

    def numbers(self) -> int:
        return 3

    def _private(self) -> None: ...

    def train(self, mode: bool = True) -> Any:
        return super().train(mode)


def messages(function: Callable[[], Any]) -> list[Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return caught


def fresh() -> Any:
    """A model of a class that nothing was said of yet."""
    return type("Fresh", (Net,), {})()


@pytest.mark.parametrize("mode", ["bf16-mixed", "16-mixed"])
def test_it_is_said_once_a_class_with_the_cure(mode: str) -> None:
    fabric = Fabric(accelerator="cpu", precision=mode)
    model, other = (fabric.setup(each) for each in (fresh(), fresh()))
    (warning,) = messages(lambda: model.training_step(X))
    assert warning.filename == __file__ and str(warning.message) == (
        f"Fresh.training_step runs its layers in float32, since only forward runs in {mode}: call "
        'fabric.mark_forward_method(model, "training_step") after setup, or run it in `with fabric.autocast():` '
        "[unmarked-method]"
    )
    assert model.seen == [torch.float32] and messages(lambda: model.training_step(X)) == []
    assert len(messages(lambda: other.training_step(X))) == 1  # another class, of the same name


def test_nothing_is_said_of_what_runs_in_the_mode() -> None:
    fabric = Fabric(accelerator="cpu", precision="bf16-mixed")
    model = fabric.setup(fresh())

    def inside() -> None:
        with fabric.autocast():
            model.training_step(X)

    calls = [inside, lambda: model(X), lambda: model.through_forward(X), model.numbers, model.train]
    assert [messages(call) for call in calls] == [[]] * 5
    fabric.mark_forward_method(model, "training_step")
    assert messages(lambda: model.training_step(X)) == [] and model.seen == [torch.bfloat16] * 2
    with pytest.raises(ValueError, match="'training_step' is marked already"):
        fabric.mark_forward_method(model, "training_step")


@pytest.mark.parametrize("mode", ["32-true", "bf16-true"])
def test_true_modes_watch_nothing(mode: str) -> None:
    model = Fabric(accelerator="cpu", precision=mode).setup(fresh())
    assert {"training_step", "numbers"}.isdisjoint(vars(model))


def test_methods_are_the_users_own() -> None:
    assert list(methods(Net())) == ["training_step", "through_forward", "numbers"]
    assert list(methods(nn.Sequential(nn.Linear(1, 1)))) == []


def test_copies_pickles_and_teardown() -> None:
    fabric = Fabric(accelerator="cpu", precision="bf16-mixed")
    model = fabric.setup(Net())
    with torch.no_grad():
        twin = copy.deepcopy(model)
        twin.layer.weight.zero_()
        twin.layer.bias.zero_()
        messages(lambda: twin.training_step(X))
        assert twin.training_step(X).item() == 0 != model.training_step(X).item()
    assert is_watched(model, "numbers") and not is_watched(pickle.loads(pickle.dumps(model)), "numbers")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), model(X))
    fabric.teardown()
    assert "training_step" not in vars(model) and "forward" not in vars(model)


class Streaming(Net):
    def stream(self, x: Tensor) -> Iterator[Tensor]:
        for _ in range(2):
            yield self.layer(x)

    def of_marked(self, x: Tensor) -> Iterator[Tensor]:
        yield self.training_step(x)


def test_generators_are_watched_while_they_run_and_cannot_be_marked() -> None:
    fabric = Fabric(accelerator="cpu", precision="bf16-mixed")
    model = fabric.setup(Streaming())
    with pytest.raises(ValueError, match=r"'stream' is a generator.*have it call a method that is marked"):
        fabric.mark_forward_method(model, "stream")
    fabric.mark_forward_method(model, "training_step")
    assert not messages(lambda: list(model.of_marked(X)))
    (said,) = messages(lambda: [each.dtype for each in model.stream(X)])
    assert "Streaming.stream runs its layers in float32" in str(said.message) and said.filename == __file__
    assert "have it call a method that fabric.mark_forward_method has marked" in str(said.message)
