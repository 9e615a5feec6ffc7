"""Overrides: what a user does with a model or an optimizer works on one that was set up, and gives the same values."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import pickle
import shutil
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precision_core import MODES, Fabric
from precision_core.override import is_overridden, original, override, undone_on_error

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        self.shift = 0.0

    def forward(self, x: Tensor, *, double: bool = False) -> Tensor:
        y = self.body(x) + torch.arange(4) / 3 + self.shift  # a created tensor, so that 64-true shows
        return 2 * y if double else y


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def set_up(mode: str, model: nn.Module | None = None) -> Any:
    return Fabric(accelerator="cpu", precision=mode).setup(Net() if model is None else model)


# ---------------------------------------------------------------- the form itself


class Greeter:
    def greet(self, name: str = "you") -> str:
        """Greets."""
        return f"hello {name}"


def shouting(function: Callable[..., str]) -> Callable[..., str]:
    def method(self: Greeter, *args: Any, **kwargs: Any) -> str:
        return function(self, *args, **kwargs).upper()

    return method


def test_it_is_named_and_documented_as_what_it_replaces_and_can_be_undone() -> None:
    greeter = Greeter()
    restore = override(greeter, "greet", shouting)
    assert greeter.greet("ann") == "HELLO ANN"
    assert greeter.greet.__name__ == "greet" and greeter.greet.__doc__ == "Greets."
    assert inspect.signature(greeter.greet) == inspect.signature(Greeter().greet)
    assert is_overridden(greeter, "greet") and not is_overridden(Greeter(), "greet")
    restore()
    assert greeter.greet() == "hello you" and vars(greeter) == {}


@pytest.mark.parametrize("bound", [True, False])
def test_what_the_user_had_put_on_the_instance_is_called_and_comes_back(bound: bool) -> None:
    def own(self: Greeter, name: str = "you") -> str:
        return f"ciao {name}"

    greeter = Greeter()
    mine: Any = MethodType(own, greeter) if bound else functools.partial(own, greeter)
    greeter.greet = mine  # type: ignore[method-assign]
    restore = override(greeter, "greet", shouting)
    assert greeter.greet("ann") == "CIAO ANN"
    restore()
    assert vars(greeter) == {"greet": mine}


def test_overrides_nest_and_come_off_in_reverse() -> None:
    greeter = Greeter()
    first = override(greeter, "greet", shouting)
    second = override(greeter, "greet", lambda function: lambda self: function(self)[::-1])
    assert greeter.greet() == "UOY OLLEH"
    second()
    assert greeter.greet() == "HELLO YOU"
    first()
    assert greeter.greet() == "hello you"


def test_two_methods_of_one_object_keep_their_own_originals() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    step, zero_grad = optimizer.step.__func__, optimizer.zero_grad.__func__  # type: ignore[attr-defined]
    restores = [override(optimizer, name, lambda function: lambda self: None) for name in ("step", "zero_grad")]
    assert original(optimizer, "step").__func__ is step  # type: ignore[attr-defined]
    assert original(optimizer, "zero_grad").__func__ is zero_grad  # type: ignore[attr-defined]
    restores[0]()
    assert not is_overridden(optimizer, "step") and is_overridden(optimizer, "zero_grad")
    restores[1]()
    assert optimizer.step.__func__ is step and optimizer.zero_grad.__func__ is zero_grad  # type: ignore[attr-defined]


def test_the_original_is_found_under_a_wrapper_that_hides_it() -> None:
    greeter = Greeter()
    restore = override(greeter, "greet", shouting)
    overridden = greeter.greet
    greeter.greet = lambda *args: overridden(*args) + "!"  # type: ignore[method-assign]
    assert greeter.greet() == "HELLO YOU!" and original(greeter, "greet")() == "hello you"
    restore()
    assert greeter.greet() == "HELLO YOU!"  # not ours to take off
    assert not is_overridden(greeter, "greet")


@pytest.mark.parametrize("own_forward", [True, False])
def test_undoing_later_keeps_no_model_alive(own_forward: bool) -> None:
    fabric, model = Fabric(accelerator="cpu"), Net()
    if own_forward:
        model.forward = MethodType(Net.forward, model)  # type: ignore[method-assign]
    optimizer = torch.optim.SGD(model.parameters())
    fabric.setup(model, optimizer)
    alive = [weakref.ref(model), weakref.ref(optimizer)]
    del model, optimizer
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    fabric.teardown()


# ---------------------------------------------------------------- what users do with a model


FAST = {("bf16-mixed", "before"), ("64-true", "after"), ("bf16-true", "in place")}
COMPILED = [
    pytest.param(mode, how, marks=[] if (mode, how) in FAST else [pytest.mark.full])
    for how in ("before", "after", "in place")
    for mode in ("bf16-mixed", "bf16-true", "64-true")
]


@pytest.mark.usefixtures("true_modes_compile")
@pytest.mark.parametrize(("mode", "how"), COMPILED)
def test_compiled_with_fullgraph_it_computes_what_it_computes_eagerly(mode: str, how: str) -> None:
    torch.compiler.reset()
    expected = set_up(mode)(X, double=True)
    model: Any = Net()
    if how == "before":
        compiled = set_up(mode, torch.compile(model, backend="aot_eager", fullgraph=True))
        assert is_overridden(model, "forward") and not is_overridden(compiled, "forward")
    elif how == "after":
        compiled = torch.compile(set_up(mode, model), backend="aot_eager", fullgraph=True)
    else:
        compiled = set_up(mode, model)
        compiled.compile(backend="aot_eager", fullgraph=True)
    output = compiled(X, double=True)
    assert output.dtype is expected.dtype and torch.equal(output, expected)
    exact = 2 * (Net().double().body(X.double()) + torch.arange(4, dtype=torch.float64) / 3)
    assert bool((output - exact).abs().max() < 1e-12) is (mode == "64-true")  # the mode was not compiled away
    output.sum().backward()
    assert model.body[0].weight.grad.dtype is MODES[mode].params


@needs_compiler
@pytest.mark.slow_start  # of the C++ compiler: with cold caches it compiles torch's headers first
@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script_method.*:DeprecationWarning"
)  # torch's own, at inductor's import
def test_compiled_by_inductor_it_stays_in_the_precision() -> None:
    torch.compiler.reset()
    expected = set_up("bf16-mixed")(X)
    output = torch.compile(set_up("bf16-mixed"), fullgraph=True)(X)
    difference = (expected - set_up("32-true")(X)).abs().max()
    assert (output - expected).abs().max() < difference / 4


def test_exported_it_computes_the_same() -> None:
    model = set_up("bf16-mixed")
    program = torch.export.export(model, (X,))
    assert torch.equal(program.module()(X), model(X))


@pytest.mark.parametrize("mode", ["64-true", "bf16-mixed", "bf16-true"])
def test_unpickled_it_is_the_plain_model(mode: str) -> None:
    model = set_up(mode)
    plain = pickle.loads(pickle.dumps(model))
    assert type(plain) is Net and plain.forward.__func__ is Net.forward and not is_overridden(plain, "forward")
    by_hand = Net().to(MODES[mode].params)
    x = X.to(MODES[mode].params)
    assert torch.equal(plain(x), by_hand(x)) and plain(x).dtype is by_hand(x).dtype


@pytest.mark.parametrize("mode", list(MODES))
def test_a_deepcopy_runs_its_own_weights_in_the_same_precision(mode: str) -> None:
    model = set_up(mode)
    expected = model(X)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    assert torch.equal(twin(X), expected) and twin(X).dtype is expected.dtype
    assert not torch.equal(model(X), expected)
    with pytest.raises(ValueError, match="a copy of it needs no setup"):
        Fabric(accelerator="cpu", precision=mode).setup(twin)


def test_a_shallow_copy_shares_weights_and_precision() -> None:
    model = set_up("bf16-mixed")
    twin = copy.copy(model)
    model.body[0].weight.data.mul_(3)
    assert torch.equal(twin(X), model(X)) and twin.body is model.body


@pytest.mark.parametrize("form", ["closure", "method"])
def test_the_users_own_forward_on_the_instance_runs_in_the_precision(form: str) -> None:
    model = Net()
    inside = []

    def closure(x: Tensor) -> Tensor:
        inside.append(model.body(x).dtype)
        return -model.body(x)

    def method(self: Net, x: Tensor) -> Tensor:
        inside.append(self.body(x).dtype)
        return -self.body(x)

    model.forward = closure if form == "closure" else MethodType(method, model)  # type: ignore[method-assign]
    own = model.forward
    fabric = Fabric(accelerator="cpu", precision="bf16-mixed")
    output = fabric.setup(model)(X)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(output, -model.body(X).float())
    assert inside == [torch.bfloat16] and output.dtype is torch.float32
    fabric.teardown()
    assert model.forward == own


def test_hooks_fire_once_and_see_what_the_caller_passes_and_gets() -> None:
    model = Net()
    seen: list[Any] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.register_forward_hook(lambda module, args, output: seen.append(output))
    set_up("bf16-true", model)
    output = model(X)
    assert len(seen) == 2 and seen[0] is X and seen[1] is output


def test_the_signature_stays_the_users() -> None:
    model = set_up("bf16-mixed")
    assert inspect.signature(model.forward) == inspect.signature(Net().forward)
    assert model.forward.__doc__ == Net.forward.__doc__


def test_overrides_of_a_context_that_raises_are_undone() -> None:
    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, *args: function(self, *args)

    model, other = Net(), Net()
    undo = override(other, "forward", wrap)
    with pytest.raises(KeyError), undone_on_error():
        late = override(model, "forward", wrap)
        override(model.body, "forward", wrap)
        raise KeyError("stop")
    assert not any("forward" in vars(module) for module in model.modules()) and is_overridden(other, "forward")
    override(model, "forward", wrap)
    late()  # what undoes the first one leaves the next one alone
    assert is_overridden(model, "forward")
    undo()
    with undone_on_error():
        override(other, "forward", wrap)
    assert is_overridden(other, "forward")
