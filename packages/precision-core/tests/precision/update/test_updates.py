"""Updates: the user's own optimizer, with its hooks, counters, schedulers and closures, whenever it was made."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

from precision_core import Fabric, HalfPrecision
from precision_core.precision.masters import REST
from precision_core.testing.stored import Model, equal, give_gradients, masters


class Unknown(Optimizer):
    """An optimizer of a third party: it steps by its closure's gradients, and keeps a floating state."""

    def __init__(self, params: Any, evaluations: int = 1) -> None:
        super().__init__(params, {"lr": 0.1})
        self.evaluations = evaluations
        self.seen: set[torch.dtype] = set()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        for _ in range(self.evaluations if closure is not None else 0):
            with torch.enable_grad():
                loss = closure()  # type: ignore[misc]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.seen.add(param.dtype)
                    average = self.state[param].setdefault("average", torch.zeros_like(param))
                    average.lerp_(param.grad, 0.5)
                    param.add_(average, alpha=-group["lr"])
        return loss


def plain(steps: int = 3, make: Callable[..., Optimizer] = AdamW) -> list[Tensor]:
    """Returns what float32 parameters become."""
    model = Model()
    optimizer = make(model.values)
    for step in range(steps):
        give_gradients(model.values, step)
        optimizer.step()
    return [param.detach() for param in model.values]


def setup(
    make: Callable[..., Optimizer] = AdamW, *, after: bool = False, mode: str = "bf16-master"
) -> tuple[Fabric, Model, Optimizer]:
    fabric, model = Fabric("cpu", precision=mode), Model()
    if after:
        fabric.setup(model)
        optimizer = make(model.values)
        fabric.setup_optimizers(optimizer)
    else:
        optimizer = make(model.values)
        fabric.setup(model, optimizer)
    return fabric, model, optimizer


def values(fabric: Fabric, model: Model) -> list[Tensor]:
    return masters(fabric.precision_plugin, model.values)  # type: ignore[arg-type]


@pytest.mark.parametrize("after", [False, True], ids=["made before setup", "made after setup"])
@pytest.mark.parametrize("make", [AdamW, optim.Adagrad, Unknown])
def test_the_users_own_optimizer_steps_float32_values(make: Callable[..., Optimizer], after: bool) -> None:
    fabric, model, optimizer = setup(make, after=after)
    assert type(optimizer) is make
    for step in range(3):
        give_gradients(model.values, step)
        optimizer.step()
    assert equal(values(fabric, model), plain(3, make))
    assert all(state[REST].dtype is torch.int16 for state in optimizer.state.values()) and len(optimizer.state) == 6
    assert model.frozen.dtype is torch.bfloat16 and fabric.precision_plugin.steps == 3
    if make is Unknown:
        assert optimizer.seen == {torch.float32}  # type: ignore[attr-defined]


def test_a_float32_model_keeps_what_its_cast_takes() -> None:
    fabric, model, optimizer = setup()
    assert equal(values(fabric, model), [param.detach() for param in Model().values])
    assert len(optimizer.state) == 6  # shown before the first step, so that a checkpoint has it


def test_hooks_counters_and_schedulers_see_one_step_of_the_parameters() -> None:
    _, model, optimizer = setup()
    scheduler = StepLR(optimizer, 1, 0.5)
    seen: list[tuple[str, list[int], list[torch.dtype]]] = []

    def look(when: str) -> Callable[..., None]:
        def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            params = optimizer.param_groups[0]["params"]
            seen.append((when, [id(param) for param in params], [param.dtype for param in params]))

        return hook

    optimizer.register_step_pre_hook(look("before"))
    optimizer.register_step_post_hook(look("after"))
    ids, groups = [id(param) for param in model.values], optimizer.param_groups
    give_gradients(model.values, 0)
    optimizer.step()
    scheduler.step()
    assert seen == [(when, ids, [torch.bfloat16] * 6) for when in ("before", "after")]
    assert optimizer.param_groups is groups and type(groups) is list
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}
    assert scheduler.last_epoch == 1 and optimizer.param_groups[0]["lr"] == 0.0005


class Subclass(AdamW):
    """An optimizer whose step calls torch's."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("make", [AdamW, Subclass, Unknown])
def test_hooks_of_the_user_run_and_ours_are_gone(make: Callable[..., Optimizer]) -> None:
    _, model, optimizer = setup(make)
    AdamW([nn.Parameter(torch.ones(1))])  # from the first on, torch calls hooks in its own class's step, too
    seen: list[torch.dtype] = []
    optimizer.register_step_post_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["params"][0].dtype))
    for step in range(2):
        give_gradients(model.values, step)
        optimizer.step()
    assert seen == [torch.bfloat16] * len(seen) and len(seen) == (4 if make is Subclass else 2)
    assert len(optimizer._optimizer_step_post_hooks) == 1 and not optimizer._optimizer_step_pre_hooks
    assert all(state["step"] == 2 for state in optimizer.state.values() if "step" in state)


@pytest.mark.parametrize("make", [SGD, Unknown], ids=["torch's", "unknown"])
def test_a_closure_runs_once_with_the_models_parameters(make: Callable[..., Optimizer]) -> None:
    fabric, model, optimizer = setup(lambda params: make(params) if make is Unknown else make(params, lr=0.1))
    calls: list[list[torch.dtype]] = []

    def closure() -> str:
        optimizer.zero_grad()
        calls.append([param.dtype for group in optimizer.param_groups for param in group["params"]])
        assert torch.is_grad_enabled() and all(param.grad is None for param in model.values)
        give_gradients(model.values, 0)
        return "loss"

    before = values(fabric, model)
    assert optimizer.step(closure) == "loss" and calls == [[torch.bfloat16] * 6]
    assert not any(torch.equal(a, b) for a, b in zip(before, values(fabric, model), strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (LBFGS, "bf16-master cannot step LBFGS, which evaluates its closure several times a step"),
        (lambda params: Adam(params, differentiable=True), "cannot step Adam(differentiable=True)"),
        (lambda params: _Lookahead(AdamW(params)), "cannot step _Lookahead, which steps by another optimizer (_Look"),
    ],
    ids=["LBFGS", "differentiable", "a wrapper"],
)
def test_what_cannot_be_stepped_is_refused_by_name(make: Callable[..., Optimizer], message: str) -> None:
    fabric, model = Fabric("cpu", precision="bf16-master"), Model()
    with pytest.raises(ValueError) as error:
        fabric.setup(model, make(model.values))
    assert message in str(error.value) and model.values[0].dtype is torch.float32


class _Lookahead(Optimizer):
    def __init__(self, inner: Optimizer) -> None:
        super().__init__([param for group in inner.param_groups for param in group["params"]], {})
        self.inner = inner


def test_an_unknown_optimizer_that_evaluates_twice_is_refused_in_its_step() -> None:
    fabric, model, optimizer = setup(lambda params: Unknown(params, evaluations=2))
    give_gradients(model.values, 0)
    with pytest.raises(ValueError, match="bf16-master cannot step Unknown, which evaluates its closure again"):
        optimizer.step(lambda: None)
    assert [id(param) for param in optimizer.param_groups[0]["params"]] == [id(param) for param in model.values]
    assert equal(values(fabric, model), [param.detach() for param in Model().values])


def test_groups_that_are_added_are_stepped_too() -> None:
    fabric, model = Fabric("cpu", precision="bf16-master"), Model()
    optimizer = AdamW(list(model.values)[:3])
    fabric.setup(model, optimizer)
    optimizer.add_param_group({"params": list(model.values)[3:], "lr": 1e-3})
    for step in range(3):
        give_gradients(model.values, step)
        optimizer.step()
    assert equal(values(fabric, model), plain(3))


def test_a_step_that_raises_leaves_the_optimizers_own_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    for make in (AdamW, Unknown):
        _, model, optimizer = setup(make)
        give_gradients(model.values, 0)
        monkeypatch.setitem(optimizer.param_groups[0], "lr", "none")
        with pytest.raises((TypeError, ValueError)):
            optimizer.step()
        held = optimizer.param_groups[0]["params"]
        assert type(optimizer.param_groups) is list
        assert [id(param) for param in held] == [id(param) for param in model.values]
        assert set(map(id, optimizer.state)) <= set(map(id, model.values))


@pytest.mark.parametrize("write", ["load_state_dict", "in place", "an optimizer of another's"])
def test_a_write_drops_the_bits_that_are_stale(write: str) -> None:
    fabric, model, optimizer = setup()
    give_gradients(model.values, 0)
    optimizer.step()
    assert all(REST in state for state in optimizer.state.values())
    param = model.values[0]
    if write == "load_state_dict":
        model.load_state_dict(model.state_dict())
    elif write == "in place":
        with torch.no_grad():
            param.mul_(1)
    else:
        param.grad = torch.zeros_like(param)
        SGD([param], lr=0.1).step()
    assert torch.equal(values(fabric, model)[0], param.detach().float())
    assert REST not in optimizer.state_dict()["state"][0]
    others = 0 if write == "load_state_dict" else 5
    assert sum(REST in state for state in optimizer.state_dict()["state"].values()) == others


def test_two_optimizers_that_share_a_parameter_share_its_bits() -> None:
    fabric, model = Fabric("cpu", precision="bf16-master"), Model()
    first, second = SGD(model.values, lr=1e-4), SGD(model.values, lr=1e-4)
    fabric.setup(model, first, second)
    for optimizer in (first, second, first):
        give_gradients(model.values, 0)
        optimizer.step()
    assert equal(values(fabric, model), plain_sgd(3))


def plain_sgd(steps: int) -> list[Tensor]:
    model = Model()
    optimizer = SGD(model.values, lr=1e-4)
    for _ in range(steps):
        give_gradients(model.values, 0)
        optimizer.step()
    return [param.detach() for param in model.values]


def test_tied_weights_have_their_bits_once() -> None:
    fabric = Fabric("cpu", precision="bf16-master")
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    optimizer = AdamW(model.parameters())
    fabric.setup(model, optimizer)
    assert model[1].weight is model[0].weight and len(optimizer.state) == 1
    give_gradients(model.parameters(), 0)
    optimizer.step()
    assert len(optimizer.state_dict()["state"]) == 1


def test_torchs_own_load_keeps_every_dtype() -> None:
    fabric, model, optimizer = setup(optim.NAdam)
    for step in range(2):
        give_gradients(model.values, step)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    other_fabric, other, loaded = setup(optim.NAdam)
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(saved)
    for mine, theirs in zip(loaded.state.values(), optimizer.state.values(), strict=True):
        assert list(mine) == list(theirs) and equal(mine.values(), theirs.values())
    for each, its in ((model, optimizer), (other, loaded)):
        give_gradients(each.values, 2)
        its.step()
    assert equal(values(fabric, model), values(other_fabric, other))
    assert equal(values(fabric, model), plain(3, optim.NAdam))


def test_a_load_that_casts_states_as_torch_does_would_be_seen() -> None:
    """The negative control of the test above: torch's cast of moments to the parameters' dtype is not bit-exact."""
    _, model, optimizer = setup(optim.NAdam)
    give_gradients(model.values, 0)
    optimizer.step()
    untouched = optim.NAdam(list(model.values))
    untouched.load_state_dict(optimizer.state_dict())
    state = untouched.state[model.values[0]]
    assert {state[key].dtype for key in ("exp_avg", REST, "mu_product")} == {torch.bfloat16}


def test_teardown_gives_the_optimizer_back() -> None:
    fabric, model, optimizer = setup(SGD)
    give_gradients(model.values, 0)
    optimizer.step()
    fabric.teardown()
    assert not optimizer._optimizer_state_dict_pre_hooks and not optimizer._optimizer_load_state_dict_post_hooks
    plainly = [nn.Parameter(param.detach().clone()) for param in model.values]
    for param, mine in zip(plainly, model.values, strict=True):
        param.grad = mine.grad
    SGD(plainly).step()
    optimizer.step()
    assert equal([param.detach() for param in model.values], [param.detach() for param in plainly])


def test_a_loop_by_hand_equals_fabric() -> None:
    model = Model()
    precision = HalfPrecision("bf16-master")
    precision.convert_module(model)
    optimizer = AdamW(model.values)
    for step in range(3):
        give_gradients(model.values, step)
        precision.optimizer_step(optimizer, model, None)
    assert equal(masters(precision, model.values), plain(3))


def test_a_model_that_was_cast_after_setup_does_not_train() -> None:
    fabric = Fabric("cpu", precision="bf16-master")
    model = nn.Linear(4, 4)
    optimizer = SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    model.float()
    with pytest.raises(RuntimeError, match="bf16-master trains bfloat16 parameters"):
        model(torch.ones(2, 4))
