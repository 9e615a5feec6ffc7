"""16-master: a step on float16 weights, scaled float16 gradients and full masters is the optimizer's on float32."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from precision_core import Fabric, HalfPrecision
from precision_core.precision.masters import MASTER
from precision_core.testing.net import Net, loss_of, make_batch
from precision_core.testing.stored import OPTIMIZERS, Model, equal, masters

FULL = pytest.param(300, marks=pytest.mark.full)
SCALE = 2.0**12


def convert(model: nn.Module, mode: str = "16-master") -> HalfPrecision:
    precision = HalfPrecision(mode, scaler={"init_scale": SCALE, "growth_interval": 10**6})
    precision.convert_module(model)
    return precision


def give_gradients(
    precision: HalfPrecision, model: Model, seed: int, params: Iterable[nn.Parameter] | None = None
) -> list[Tensor | None]:
    """Runs a scaled backward that leaves random float16 gradients; returns them unscaled, in float32.

    Some are so small that float16 holds them only scaled.
    """
    generator = torch.Generator().manual_seed(seed)
    loss, params = torch.zeros(()), model.values if params is None else params
    for param in params:
        gradient = torch.randn(param.shape, generator=generator) * 2.0 ** -torch.randint(
            0, 24, (1,), generator=generator
        )
        loss = loss + (param.float() * gradient).sum()
    scaled = precision.pre_backward(loss, model)
    scaled.backward()
    precision.post_backward(scaled, model)
    return [None if param.grad is None else param.grad.float() / SCALE for param in model.values]


@pytest.mark.parametrize("steps", [4, FULL])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_master_equals_float32_bit_for_bit(name: str, steps: int) -> None:
    wide, half = Model(), Model()
    precision = convert(half)
    reference, optimizer = OPTIMIZERS[name](wide.values), OPTIMIZERS[name](half.values)
    precision.register_optimizers(optimizer)
    held = [param for group in optimizer.param_groups for param in group["params"]]  # Muon's are matrices
    for step in range(steps):
        optimizer.zero_grad()
        for param, gradient in zip(wide.values, give_gradients(precision, half, step, held), strict=True):
            param.grad = None if gradient is None else torch.empty_like(param).copy_(gradient)
        reference.step()
        precision.optimizer_step(optimizer, half, None)
        assert not precision.last_step_skipped
        if step in (0, 1, steps - 1):
            assert equal(masters(precision, half.values), [param.detach() for param in wide.values])
    assert equal(*(list(_moments(each)) for each in (optimizer, reference)))
    assert equal([param.detach() for param in half.values], [param.detach().half() for param in wide.values])


def _moments(optimizer: Optimizer) -> list[Tensor]:
    states = optimizer.state_dict()["state"]
    named = [(index, key, value) for index, state in states.items() for key, value in state.items()]
    return [torch.as_tensor(value) for _, key, value in named if key != MASTER and value is not None]


def test_gradients_unscaled_in_float16_would_not_equal_float32() -> None:
    """The negative control: of these gradients float16 loses what float32 has."""
    wide, half = Model(), Model()
    precision = convert(half)
    precision.register_optimizers(SGD(half.values, lr=1.0))
    gradients = give_gradients(precision, half, 0)
    lost = [(each.half().float() - each).abs().max() > 0 for each in gradients if each is not None]
    assert any(map(bool, lost)) and len(wide.values) == len(gradients)


def test_fifty_steps_of_fabric_equal_adamw_on_float32() -> None:
    fabric = Fabric("cpu", precision=HalfPrecision("16-master", scaler={"init_scale": 2.0**16, "growth_interval": 7}))
    model = Net(0)
    trained = [param for param in model.parameters() if param.requires_grad]
    reference = [nn.Parameter(param.detach().clone()) for param in trained]
    optimizer, plain = AdamW(trained, lr=1e-3), AdamW(reference, lr=1e-3)
    fabric.setup(model, optimizer)
    plugin, scales = fabric.precision_plugin, set()
    for step in range(50):
        batch, target = make_batch(step)
        optimizer.zero_grad()
        fabric.backward(loss_of(model(batch), target))
        scales.add(plugin.scale)
        for param, mine in zip(reference, trained, strict=True):
            assert mine.grad is None or mine.grad.dtype is torch.float16
            param.grad = None if mine.grad is None else mine.grad.float() / plugin.scale
        optimizer.step()
        if not plugin.last_step_skipped:
            plain.step()
        assert equal(masters(plugin, trained), [param.detach() for param in reference])  # type: ignore[arg-type]
    assert plugin.skipped_steps > 0 and plugin.steps + plugin.skipped_steps == 50 and len(scales) > 2
    assert {param.dtype for param in trained} == {torch.float16}
    assert {value.dtype for state in optimizer.state.values() for value in state.values()} == {torch.float32}


def test_the_state_keeps_16_bytes_a_parameter() -> None:
    half = Model()
    precision, optimizer = convert(half), AdamW(half.values)
    precision.register_optimizers(optimizer)
    give_gradients(precision, half, 0)
    precision.optimizer_step(optimizer, half, None)
    kept = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    kept += [param.grad for param in half.values if param.grad is not None] + list(half.values)
    numbers = sum(param.numel() for param in half.values)
    assert sum(each.numel() * each.element_size() for each in kept) == 16 * numbers


class Unknown(Optimizer):
    """An optimizer of a third party: all float32 copies are there at once."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            for param in group["params"]:
                average = self.state[param].setdefault("average", torch.zeros_like(param))
                param.sub_(average.lerp_(param.grad, 0.5), alpha=group["lr"])
        return result


@pytest.mark.parametrize("by_closure", [False, True])
def test_an_unknown_optimizer_steps_unscaled_gradients(by_closure: bool) -> None:
    wide, half = Model(), Model()
    precision = convert(half)
    optimizer, reference = Unknown(half.values), Unknown(wide.values)
    precision.register_optimizers(optimizer)
    found: list[Tensor | None] = []

    def closure() -> str:
        optimizer.zero_grad()
        found[:] = give_gradients(precision, half, 0)
        return "loss"

    for _ in range(2):
        if by_closure:
            assert precision.optimizer_step(optimizer, half, closure) == "loss"
        else:
            closure()
            precision.optimizer_step(optimizer, half, None)
        for param, gradient in zip(wide.values, found, strict=True):
            param.grad = gradient
        reference.step()
        assert equal(masters(precision, half.values), [param.detach() for param in wide.values])


def test_sparse_gradients_and_parameters_with_gaps_step_whole() -> None:
    values, dense = torch.randn(6, 4), torch.randn(6, 8)
    model = nn.Module()
    model.table, model.gaps = nn.Parameter(values.clone()), nn.Parameter(dense.clone()[:, ::2])
    reference = [nn.Parameter(values.clone()), nn.Parameter(dense[:, ::2].clone())]
    precision = convert(model)
    model.gaps.data = torch.empty(6, 8, dtype=torch.float16)[:, ::2].copy_(model.gaps.data)
    rests = precision._updates.storage.rests  # type: ignore[union-attr]
    rests.put(model.gaps, rests._entries[model.gaps][0])
    optimizer, wide = SGD(model.parameters(), lr=0.1, momentum=0.9), SGD(reference, lr=0.1, momentum=0.9)
    precision.register_optimizers(optimizer)
    for _ in range(2):
        sparse = torch.sparse_coo_tensor([[1, 4]], torch.ones(2, 4), (6, 4), check_invariants=True)
        model.zero_grad()
        precision.pre_backward(torch.zeros((), requires_grad=True) * 1.0, model).backward()
        model.table.grad, model.gaps.grad = (sparse * SCALE).half(), torch.full((6, 4), SCALE, dtype=torch.float16)
        reference[0].grad, reference[1].grad = sparse, torch.ones(6, 4)
        precision.optimizer_step(optimizer, model, None)
        wide.step()
    assert not model.gaps.is_contiguous()
    assert equal(masters(precision, model.parameters()), [param.detach() for param in reference])


# -------------------------------------------------------------------- writes by others


def stepped(write: Callable[[nn.Parameter], None]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the weight as it was written, and the master before and after a step of zeros that follows."""
    torch.manual_seed(0)
    model = nn.Linear(40, 40, bias=False)
    precision = convert(model)
    before = masters(precision, [model.weight])[0]
    write(model.weight)
    written = model.weight.detach().clone()
    optimizer = SGD(model.parameters(), lr=1.0)
    precision.register_optimizers(optimizer)
    precision.pre_backward((model.weight * 0).sum().float(), model).backward()
    precision.optimizer_step(optimizer, model, None)
    assert torch.equal(model.weight, written)
    return written, before, masters(precision, [model.weight])[0]


def test_nobody_wrote() -> None:
    _, before, after = stepped(lambda weight: None)
    assert torch.equal(before, after) and not torch.equal(before, before.half().float())


def test_a_write_in_place_is_the_value_from_then_on() -> None:
    def write(weight: nn.Parameter) -> None:
        with torch.no_grad():
            weight[0] = 3.0

    written, _, after = stepped(write)
    assert torch.equal(after, written.float())  # all of the parameter, as torch counts writes by tensor


def test_a_write_through_data_is_kept_where_it_was() -> None:
    def write(weight: nn.Parameter) -> None:
        weight.data[0] = 3.0

    written, before, after = stepped(write)
    assert torch.equal(after[0], written[0].float()) and torch.equal(after[1:], before[1:])


def test_nan_and_inf_written_through_data_are_seen() -> None:
    def write(weight: nn.Parameter) -> None:
        weight.data[0, 0], weight.data[0, 1] = float("inf"), float("nan")

    torch.manual_seed(0)
    model = nn.Linear(4, 4, bias=False)
    precision = convert(model)
    write(model.weight)
    value = masters(precision, [model.weight])[0]
    assert value[0, 0] == float("inf") and value[0, 1].isnan() and value[1:].isfinite().all()


# -------------------------------------------------------------------- beyond float16


def test_weights_beyond_float16_are_named_at_setup() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[0, 0] = 70_000.0
        model[0].bias[0] = 65_504.0  # the largest
    message = r"16-master computes with float16 weights, whose largest number is 65,504: beyond it are weights of "
    with pytest.raises(ValueError, match=message + r"1\.weight \(up to 70000\)"):
        Fabric("cpu", precision="16-master").setup(model, SGD(model.parameters(), lr=0.1))
    assert {param.dtype for param in model.parameters()} == {torch.float32}  # nothing was cast
    Fabric("cpu", precision="16-master; 1: 32-true").setup(model, SGD(model.parameters(), lr=0.1))


def test_weights_that_grow_beyond_it_are_named_when_steps_are_skipped() -> None:
    fabric = Fabric("cpu", precision=HalfPrecision("16-master", max_skips=3))
    model = nn.Linear(4, 4, bias=False)
    optimizer = SGD(model.parameters(), lr=1e6)
    fabric.setup(model, optimizer)
    with pytest.raises(FloatingPointError, match=r"weights of weight are beyond 65,504, the largest number of float16"):
        for _ in range(40):
            optimizer.zero_grad()
            fabric.backward(model(torch.ones(2, 4)).square().mean())
            optimizer.step()


def test_complex_parameters_are_refused_at_setup() -> None:
    model = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"16-master scales the loss.*\[complex-parameters\]"):
        convert(model)
