"""Steps and changes that do not know that gradients carry a scale: right, or an error before anything moves.

The model is one weight of 1 whose gradient is 1, and SGD's learning rate 0.1: a right step ends at 0.9, one of scaled
gradients far away.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_pre_hooks, register_optimizer_step_pre_hook

from precision_core import DDPStrategy, Fabric, MixedPrecision
from precision_core.scaling.guard import stepping
from precision_core.testing import run_in_ranks

SCALE = 1024.0
X = torch.ones(1, 1)
RIGHT = pytest.approx(0.9, abs=1e-3)


@pytest.fixture(autouse=True)
def _no_hook_stays() -> Iterator[None]:
    yield
    gc.collect()  # fabrics that ended in an error
    assert not _global_optimizer_pre_hooks


def make_fabric() -> Fabric:
    plugin = MixedPrecision("16-mixed", device="cpu", scaler={"init_scale": SCALE})
    return Fabric(accelerator="cpu", precision=plugin)


def weight() -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    return layer


def sgd(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.1)


def train(fabric: Fabric, *models: nn.Module) -> None:
    fabric.backward(sum(model(X).sum() for model in models))


class Lookahead(Optimizer):
    """Steps by another optimizer, which it holds."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__([param for group in inner.param_groups for param in group["params"]], {})
        self.inner = inner

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.inner.step()


class SAM(Optimizer):
    """As its public implementations are: a first step to where the loss is worst, a second one from there."""

    def __init__(self, params: Any, base: type[Optimizer], **options: Any) -> None:
        super().__init__(params, options)
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for param in self.param_groups[0]["params"]:
            self.state[param]["old"] = param.clone()
            param.add_(param.grad, alpha=0.05)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for param in self.param_groups[0]["params"]:
            param.copy_(self.state[param]["old"])
        self.base_optimizer.step()
        self.zero_grad()


# -------------------------------------------------------------------- optimizers that were not set up


def forgotten(fabric: Fabric, model: nn.Module) -> None:
    fabric.setup(model)
    train(fabric, model)
    sgd(model).step()


def made_before(fabric: Fabric, model: nn.Module) -> None:
    optimizer = AdamW(model.parameters(), lr=0.1, fused=True)
    fabric.setup(model)
    train(fabric, model)
    optimizer.step()


def in_backward(fabric: Fabric, model: nn.Module) -> None:
    fabric.setup(model)
    optimizer = sgd(model)
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    train(fabric, model)


def in_a_closure(fabric: Fabric, model: nn.Module) -> None:
    fabric.setup(model)
    optimizer = sgd(model)
    optimizer.step(lambda: train(fabric, model))  # type: ignore[arg-type,return-value]


def wrapped(fabric: Fabric, model: nn.Module) -> None:
    fabric.setup(model)
    outer = Lookahead(sgd(model))
    train(fabric, model)
    outer.step()


def of_an_added_layer(fabric: Fabric, model: nn.Module) -> None:
    other = weight()
    fabric.setup(other, sgd(other))
    fabric.setup(model)
    train(fabric, other)
    added = model.register_parameter("added", nn.Parameter(torch.ones(1))) or model.added
    fabric.backward((model(X) * added).sum())  # type: ignore[operator]
    SGD([added], lr=0.1).step()  # type: ignore[list-item]


FORGOTTEN = [forgotten, made_before, in_backward, in_a_closure, wrapped, of_an_added_layer]


@pytest.mark.parametrize("loop", FORGOTTEN)
def test_an_optimizer_that_was_not_set_up_raises_before_it_steps(loop: Callable[..., None]) -> None:
    fabric, model = make_fabric(), weight()
    with pytest.raises(RuntimeError, match=r"was not set up.*fabric\.setup_optimizers\(optimizer\)"):
        loop(fabric, model)
    assert {param.item() for param in model.parameters()} == {1.0}


@pytest.mark.parametrize("kind", ["criterion", "parameter", "input"])
@pytest.mark.parametrize("order", ["alone", "first", "second"])
def test_an_optimizer_of_what_no_model_has_raises_before_it_steps(kind: str, order: str) -> None:
    fabric, model, criterion = make_fabric(), weight(), weight()
    optimizer = sgd(model)
    if order == "alone":  # the model is frozen, as in a style transfer
        fabric.setup(model.requires_grad_(False))
    else:
        fabric.setup(model, optimizer)
    leaves: dict[str, Any] = {"criterion": criterion.weight, "parameter": nn.Parameter(torch.ones(1, 1))}
    leaf = leaves.get(kind, torch.ones(1, 1))
    forgotten = SGD([leaf.requires_grad_()], lr=0.1)
    other = weight()
    for beside in (torch.ones(1, 1).requires_grad_(), torch.ones(1, 1).requires_grad_(), leaf):  # in the third loss
        fabric.backward((model(X) * beside).sum())
        optimizer.zero_grad() if beside is not leaf else None
    if order == "second":
        optimizer.step()
    other(X).sum().backward()
    sgd(other).step()  # has nothing to do with the run
    with pytest.raises(RuntimeError, match=r"SGD was not set up.*fabric\.setup_optimizers\(optimizer\)"):
        forgotten.step()
    assert (leaf.item(), other.weight.item()) == (1.0, RIGHT)
    fabric.setup_optimizers(forgotten)
    forgotten.step()
    assert leaf.item() == RIGHT
    model.zero_grad()


def test_gradients_of_inputs_are_left_as_they_were_read() -> None:
    fabric, model = make_fabric(), weight()
    optimizer = sgd(model)
    fabric.setup(model, optimizer)
    x = torch.ones(1, 1, requires_grad=True)
    train_on = model(x).sum()
    fabric.backward(train_on)
    read = x.grad
    with torch.no_grad():
        x += 0.1 * read.sign()  # type: ignore[union-attr]
    optimizer.zero_grad()
    fabric.backward(model(x).sum() * float("inf"))
    optimizer.step()  # is skipped, and the scale falls
    optimizer.zero_grad()
    x.grad = read
    read.fill_(SCALE)  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(fabric, model)
    assert read.item() == SCALE  # type: ignore[union-attr]
    optimizer.step()
    assert model.weight.item() == RIGHT


def test_the_second_of_two_optimizers_was_forgotten() -> None:
    fabric, first, second = make_fabric(), weight(), weight()
    of_first, of_second = sgd(first), sgd(second)
    fabric.setup(first, of_first)
    fabric.setup(second)
    train(fabric, first, second)
    of_first.step()
    with pytest.raises(RuntimeError, match="SGD was not set up"):
        of_second.step()
    assert (first.weight.item(), second.weight.item()) == (RIGHT, 1.0)


def test_optimizers_that_are_set_up_after_backward_step_right() -> None:
    fabric, first, second = make_fabric(), weight(), weight()
    of_first = sgd(first)
    fabric.setup(first, of_first)
    fabric.setup(second)
    train(fabric, first, second)
    of_first.zero_grad()
    with pytest.warns(UserWarning, match="nobody stepped"):
        fabric.backward(first(X).sum() * float("inf"))
    of_first.step()  # is skipped, and the scale falls: the second's gradients follow
    of_second = fabric.setup_optimizers(sgd(second))
    of_second.step()
    assert (first.weight.item(), second.weight.item(), fabric.precision_plugin.scale) == (1.0, RIGHT, SCALE / 2)


# -------------------------------------------------------------------- steps that are right


def test_optimizers_of_gradients_without_a_scale_step_freely() -> None:
    fabric, model, beside, outside = make_fabric(), weight(), weight(), weight()
    optimizer = sgd(model)
    fabric.setup(model, optimizer)
    fabric.setup(beside)
    train(fabric, model)
    (beside(X) + outside(X)).sum().backward()
    sgd(beside).step()
    sgd(outside).step()
    optimizer.step()
    assert [each.weight.item() for each in (model, beside, outside)] == [RIGHT] * 3
    assert not _global_optimizer_pre_hooks


def test_optimizers_that_were_set_up_step_in_backward() -> None:
    fabric, model = make_fabric(), nn.Sequential(weight(), weight())
    fabric.setup(model)
    optimizers = {param: fabric.setup_optimizers(SGD([param], lr=0.1)) for param in model.parameters()}

    def step(param: nn.Parameter) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(step)
    for expected in (0.9, 0.9 - 0.1 * 0.9):
        train(fabric, model)
        assert model[0].weight.item() == model[1].weight.item() == pytest.approx(expected, abs=1e-3)
    assert fabric.precision_plugin.steps == 4


@pytest.mark.parametrize("outer_is_set_up", [True, False])
def test_an_optimizer_inside_another(outer_is_set_up: bool) -> None:
    fabric, model = make_fabric(), weight()
    inner = sgd(model)
    outer = Lookahead(inner)
    fabric.setup(model, outer if outer_is_set_up else inner)
    for expected in (0.9, 0.8):
        train(fabric, model)
        outer.step()
        outer.zero_grad()
        assert model.weight.item() == pytest.approx(expected, abs=1e-3)


def test_two_steps_of_sam() -> None:
    fabric, model = make_fabric(), weight()
    optimizer = SAM(model.parameters(), SGD, lr=0.1)
    fabric.setup(model, optimizer)

    def backward() -> None:
        fabric.backward(model(X).square().sum() / 2)

    backward()
    fabric.unscale_gradients(optimizer)
    optimizer.first_step()
    assert model.weight.item() == pytest.approx(1.05)
    backward()
    with pytest.raises(RuntimeError, match=r"SAM, which fabric\.setup was given.*fabric\.unscale_gradients"):
        optimizer.second_step()
    fabric.unscale_gradients(optimizer)
    optimizer.second_step()
    assert model.weight.item() == pytest.approx(1 - 0.1 * 1.05, abs=1e-3)


def test_a_step_past_the_override_raises() -> None:
    fabric, model = make_fabric(), weight()
    optimizer = sgd(model)
    fabric.setup(model, optimizer)
    train(fabric, model)
    with pytest.raises(RuntimeError, match="went past"):
        SGD.step(optimizer)
    optimizer.step()
    assert model.weight.item() == RIGHT


def test_without_fabric() -> None:
    plugin, model = MixedPrecision("16-mixed", "cpu", {"init_scale": SCALE}), weight()
    optimizer = sgd(model)
    plugin.convert_module(model)
    plugin.pre_backward(model(X).sum(), model).backward()
    with pytest.raises(RuntimeError, match=r"precision\.optimizer_step"):
        optimizer.step()
    plugin.optimizer_step(optimizer, model, None)
    assert model.weight.item() == RIGHT


def test_teardown_leaves_unscaled_gradients() -> None:
    fabric, model = make_fabric(), weight()
    optimizer = sgd(model)
    fabric.setup(model, optimizer)
    train(fabric, model)
    fabric.teardown()
    optimizer.step()
    assert model.weight.item() == RIGHT


def test_whose_step_this_is() -> None:
    found: list[Optimizer] = []
    inner = sgd(weight())
    outer = Lookahead(inner)
    inner.step = lambda: SGD.step(inner, lambda: found.extend(stepping()))  # type: ignore
    outer.step()
    assert found == [inner, outer]  # by a name of torch's own


def test_a_fabric_that_is_collected_during_a_step_does_no_harm() -> None:
    fabric, model = make_fabric(), weight()
    fabric.setup(model)
    train(fabric, model)
    cycle = [fabric]
    cycle.append(cycle)  # type: ignore[arg-type]
    gc.disable()
    handle = register_optimizer_step_pre_hook(lambda *_: gc.collect() and None)
    try:
        del fabric, model, cycle
        other = weight()
        other(X).sum().backward()
        sgd(other).step()
        assert other.weight.item() == RIGHT
        assert len(_global_optimizer_pre_hooks) == 2
    finally:
        handle.remove()
        gc.enable()
    fabric, other = make_fabric(), weight()
    optimizer = sgd(other)
    fabric.setup(other, optimizer)
    train(fabric, other)
    optimizer.step()
    assert not _global_optimizer_pre_hooks


# -------------------------------------------------------------------- changes of scaled gradients


def clipped(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)


def clipped_by_value(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 0.5)


def masked(model: nn.Module) -> None:
    for param in model.parameters():
        assert param.grad is not None
        param.grad[...] *= 0.5


def replaced(model: nn.Module) -> None:
    for param in model.parameters():
        param.grad = torch.ones_like(param)


def added_to(model: nn.Module) -> None:
    model(X).sum().backward()


def dropped_for_a_plain_backward(model: nn.Module) -> None:
    model.zero_grad()
    model(X).sum().backward()


CHANGES = [clipped, clipped_by_value, masked, replaced, added_to, dropped_for_a_plain_backward]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("then", ["step", "clip", "unscale", "backward"])
def test_scaled_gradients_that_were_changed_raise(change: Callable[[nn.Module], None], then: str) -> None:
    fabric, model = make_fabric(), weight()
    optimizer = sgd(model)
    fabric.setup(model, optimizer)
    calls: dict[str, Callable[[], Any]] = {
        "step": optimizer.step,
        "clip": lambda: fabric.clip_gradients(model, optimizer, max_norm=1.0),
        "unscale": lambda: fabric.unscale_gradients(optimizer),
        "backward": lambda: train(fabric, model),
    }
    train(fabric, model)
    change(model)
    with pytest.raises(RuntimeError, match=r"weight were changed.*fabric\.unscale_gradients\(optimizer\)"):
        calls[then]()
    assert model.weight.item() == 1.0
    optimizer.zero_grad()
    train(fabric, model)
    optimizer.step()
    assert model.weight.item() == RIGHT
    train(fabric, model)
    fabric.unscale_gradients(optimizer)
    change(model)  # now it may
    optimizer.step()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_dropped_gradients_are_no_change(set_to_none: bool) -> None:
    fabric, model = make_fabric(), weight()
    optimizer = sgd(model)
    fabric.setup(model, optimizer)
    for _ in range(2):
        train(fabric, model)
        optimizer.zero_grad(set_to_none=set_to_none)
    optimizer.step()
    train(fabric, model)
    optimizer.step()
    assert model.weight.item() == RIGHT


def test_torchs_own_scaler_may_unscale() -> None:
    fabric, model = make_fabric(), weight()
    optimizer = sgd(model)
    fabric.setup(model, optimizer)
    train(fabric, model)
    fabric.precision_plugin.setup_scaler().unscale_(optimizer)  # type: ignore[attr-defined]
    clipped(model)
    optimizer.step()
    assert model.weight.item() == pytest.approx(0.95, abs=1e-3)


def accumulate(buckets: bool) -> float:
    fabric = Fabric(
        accelerator="cpu", devices=2, strategy=DDPStrategy(gradient_as_bucket_view=buckets), precision="16-mixed"
    )
    model = weight()
    optimizer = sgd(model)
    fabric.setup(model, optimizer)
    for _ in range(3):  # DDP rebuilds its buckets, and with them the gradients, in its second forward
        for last in (False, False, True):
            with fabric.no_backward_sync(model, enabled=not last):
                fabric.backward(model(X).sum() / 2)
        fabric.backward(model(X).sum() / 2)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        before = model.weight.item()
    fabric.backward(model(X).sum() / 2)
    clipped(model)
    with pytest.raises(RuntimeError, match=r"fabric\.unscale_gradients"):
        optimizer.step()
    fabric.teardown()
    return before


@pytest.mark.parametrize("buckets", [True, False])
def test_ddp_changes_no_gradients_between_backward_and_step(buckets: bool) -> None:
    assert run_in_ranks(2, accumulate, buckets) == [pytest.approx(1 - 3 * 0.2, abs=1e-3)] * 2


# -------------------------------------------------------------------- what only its traces tell


@torch.no_grad()
def by_hand(model: nn.Module) -> None:
    for param in model.parameters():
        param -= 0.1 * param.grad  # type: ignore[operator]
    model.zero_grad()


@torch.no_grad()
def past_autograd(model: nn.Module) -> None:
    for param in model.parameters():
        param.data.sub_(param.grad, alpha=0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("update", "said"),
    [(by_hand, "weight changed while.*fabric.unscale_gradients"), (past_autograd, "weight have gradients.*nobody")],
)
def test_updates_by_hand_are_noticed_at_the_next_backward(update: Callable[[nn.Module], None], said: str) -> None:
    fabric, model = make_fabric(), weight()
    fabric.setup(model)
    train(fabric, model)
    update(model)
    with pytest.warns(UserWarning, match=said) as caught:
        train(fabric, model)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        train(fabric, model)


def test_a_first_step_on_scaled_gradients_is_noticed() -> None:
    fabric, model = make_fabric(), weight()
    optimizer = SAM(model.parameters(), SGD, lr=0.1)
    fabric.setup(model, optimizer)
    train(fabric, model)
    optimizer.first_step()
    with pytest.warns(UserWarning, match="first_step"):
        train(fabric, model)


def test_accumulation_says_nothing() -> None:
    fabric, model, frozen = make_fabric(), weight(), weight().requires_grad_(False)
    optimizer = sgd(model)
    fabric.setup(model, optimizer)
    fabric.setup(frozen)
    for _ in range(3):
        fabric.backward(frozen(model(X)).sum())
    optimizer.step()
    assert model.weight.item() == pytest.approx(0.7, abs=1e-3)


# -------------------------------------------------------------------- unscaled gradients that overflowed


def of_the_other(fabric: Fabric, model: nn.Module, other: Optimizer) -> None:
    fabric.setup(model)
    fabric.backward(model(X).sum() * float("inf"))
    fabric.unscale_gradients(other)


def of_the_known(fabric: Fabric, model: nn.Module, other: Optimizer) -> None:
    optimizer = sgd(model)
    fabric.setup(model, optimizer)
    fabric.backward(model(X).sum() * float("inf"))
    fabric.unscale_gradients(optimizer)


def by_clipping(fabric: Fabric, model: nn.Module, other: Optimizer) -> None:
    fabric.setup(model)
    fabric.backward(model(X).sum() * float("inf"))
    fabric.clip_gradients(model, other, max_norm=1.0)


@pytest.mark.parametrize("unscale", [of_the_other, of_the_known, by_clipping])
def test_an_overflow_raises_where_nothing_skips_it(unscale: Callable[..., None]) -> None:
    fabric, model = make_fabric(), weight()
    other = sgd(model)
    unscale(fabric, model, other)
    with pytest.raises(RuntimeError, match=r"SGD was about to step gradients that overflowed.*fabric\.setup"):
        other.step()
    assert model.weight.item() == 1.0
    model.weight.grad.zero_()  # type: ignore[union-attr]
    other.step()  # mended by hand
    assert model.weight.item() == 1.0


# -------------------------------------------------------------------- closures


class Twice(SGD):
    """Looks at the loss once more than it has to, as line searches do."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        assert closure is not None, "this optimizer needs its closure"
        closure()
        return super().step(closure)


class SAMByClosure(SAM):
    """SAM's other public form."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        assert closure is not None, "this optimizer needs its closure"
        self.first_step()
        closure()
        self.second_step()


def closure_of(fabric: Fabric, model: nn.Module, factors: Any = None, drops: bool = True) -> Callable[[], torch.Tensor]:
    def closure() -> torch.Tensor:
        if drops:
            model.zero_grad()
        loss = model(X).square().sum() / 2
        fabric.backward(loss * (1.0 if factors is None else next(factors)))
        return loss

    return closure


def test_a_closure_reaches_an_optimizer_that_evaluates_it_itself() -> None:
    fabric, model = make_fabric(), weight()
    optimizer = Twice(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    for expected in (1.0, 0.9):
        loss = optimizer.step(closure_of(fabric, model))
        assert loss.item() == pytest.approx(expected**2 / 2, abs=1e-3)
        assert model.weight.item() == pytest.approx(0.9 * expected, abs=1e-3)
    assert fabric.precision_plugin.steps == 2


def test_a_closure_of_sam() -> None:
    fabric, model = make_fabric(), weight()
    optimizer = SAMByClosure(model.parameters(), SGD, lr=0.1)
    fabric.setup(model, optimizer)
    closure = closure_of(fabric, model, drops=False)
    closure()
    optimizer.step(closure)
    assert model.weight.item() == pytest.approx(1 - 0.1 * 1.05, abs=1e-3)


def test_an_overflow_before_anything_moved_skips_the_step() -> None:
    fabric, model = make_fabric(), weight()
    optimizer = Twice(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    loss = optimizer.step(closure_of(fabric, model, iter([float("inf")])))
    plugin = fabric.precision_plugin
    assert (model.weight.item(), loss.item(), plugin.scale) == (1.0, 0.5, SCALE / 2)
    assert (plugin.skipped_steps, fabric.last_step_skipped) == (1, True)
    optimizer.step(closure_of(fabric, model))
    assert model.weight.item() == RIGHT


def test_an_overflow_between_two_halves_of_a_step_is_evaluated_again() -> None:
    fabric, model = make_fabric(), weight()
    optimizer = SAMByClosure(model.parameters(), SGD, lr=0.1)
    fabric.setup(model, optimizer)
    closure = closure_of(fabric, model, iter([1.0, float("inf"), float("nan"), 1.0]), drops=False)
    closure()
    optimizer.step(closure)
    assert model.weight.item() == pytest.approx(1 - 0.1 * 1.05, abs=1e-3)
    assert (fabric.precision_plugin.scale, fabric.precision_plugin.steps) == (SCALE / 4, 1)
    closure_of(fabric, model)()
    with pytest.raises(FloatingPointError, match="SAMByClosure: inf or NaN in its closure's"):
        optimizer.step(closure_of(fabric, model, iter([float("nan")] * 100), drops=False))


def test_gradients_that_overflowed_before_a_step_with_a_closure_skip_it() -> None:
    fabric, model = make_fabric(), weight()
    optimizer = SAMByClosure(model.parameters(), SGD, lr=0.1)
    fabric.setup(model, optimizer)
    closure_of(fabric, model, iter([float("inf")]))()
    assert optimizer.step(closure_of(fabric, model)) is None
    assert (model.weight.item(), fabric.precision_plugin.skipped_steps) == (1.0, 1)


# -------------------------------------------------------------------- gradients that torch does not unscale


def thawed(fabric: Fabric, model: nn.Sequential) -> Optimizer:
    model[0].requires_grad_(False)
    optimizer = sgd(model)
    fabric.setup(model, optimizer)
    model[0].requires_grad_(True)
    return optimizer


def added(fabric: Fabric, model: nn.Sequential) -> Optimizer:
    optimizer = sgd(model[1])
    model[0].requires_grad_(False)
    fabric.setup(model, optimizer)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters())})
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("start", [thawed, added])
@pytest.mark.parametrize("clips", [True, False])
def test_parameters_that_cannot_be_unscaled_are_named(start: Any, dtype: torch.dtype, clips: bool) -> None:
    fabric, model = make_fabric(), nn.Sequential(weight(), weight())
    model[0].weight = nn.Parameter(model[0].weight.to(dtype))
    optimizer = start(fabric, model)
    fabric.backward((model[0].weight.abs().float() * model[1].weight).sum())
    with pytest.raises(ValueError, match=r"0\.weight \((b?float16|complex64)\).*requires_grad_\(False\)"):
        fabric.clip_gradients(model, optimizer, max_norm=1.0) if clips else optimizer.step()
    assert model[1].weight.item() == 1.0


def test_complex_parameters_that_train_are_refused_at_setup() -> None:
    model = nn.Sequential(weight())
    model[0].register_parameter("phase", nn.Parameter(torch.ones(2, dtype=torch.complex64)))
    with pytest.raises(
        ValueError, match=r"complex gradients, those of 0\.phase \(complex64\): use precision=\"bf16-mixed\""
    ):
        make_fabric().setup(model)
    model[0].phase.requires_grad_(False)
    make_fabric().setup(model)
