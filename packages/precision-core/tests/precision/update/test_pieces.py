"""Pieces: a step on bfloat16 weights and the rest of their values is the optimizer's on float32, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from precision_core import HalfPrecision
from precision_core.testing.stored import FORMS, OPTIMIZERS, Model, equal, give_gradients, masters


def convert(model: nn.Module, mode: str = "bf16-master") -> HalfPrecision:
    precision = HalfPrecision(mode)
    precision.convert_module(model)
    return precision


LAW = [
    *((name, 4) for name in OPTIMIZERS),
    *(pytest.param(name, 300, marks=pytest.mark.full) for name in OPTIMIZERS | FORMS),
]


@pytest.mark.parametrize(("name", "steps"), LAW)
def test_a_master_equals_float32_bit_for_bit(name: str, steps: int) -> None:
    wide, half = Model(), Model()
    precision, make = convert(half), (OPTIMIZERS | FORMS)[name]
    reference, optimizer = make(wide.values), make(half.values)
    for step in range(steps):
        give_gradients(wide.values, step)
        give_gradients(half.values, step)
        reference.step()
        precision.optimizer_step(optimizer, half, None)
        if step in (0, 1, steps - 1):
            assert equal(masters(precision, half.values), [param.detach() for param in wide.values])
    assert equal(*(list(_moments(each)) for each in (optimizer, reference)))
    weights = torch.cat([param.flatten() for param in half.values]).float()
    full = torch.cat([param.detach().flatten() for param in wide.values])
    assert all(param.dtype is torch.bfloat16 for param in half.values)
    assert ((weights - full).abs() <= full.abs() * 2**-8).all() and not torch.equal(weights, full)


def _moments(optimizer: Optimizer) -> list[Tensor]:
    states = optimizer.state_dict()["state"]
    named = [(index, key, value) for index, state in states.items() for key, value in state.items()]
    return [torch.as_tensor(value) for _, key, value in named if key != "master_rest" and value is not None]


def test_without_the_rest_it_does_not_equal_float32() -> None:
    """The negative control: weights alone lose the small updates, whatever dtype the state has."""
    wide, half = Model(), Model()
    precision = convert(half, "params=bfloat16,state=float32")
    reference, optimizer = AdamW(wide.values, lr=1e-5), AdamW(half.values, lr=1e-5)
    start = masters(precision, half.values)
    for _ in range(4):
        give_gradients(wide.values, 0)
        give_gradients(half.values, 0)
        reference.step()
        precision.optimizer_step(optimizer, half, None)
    moved = [(a - b).abs().max() > 0 for a, b in zip(masters(precision, half.values), start, strict=True)]
    assert not equal(masters(precision, half.values), [param.detach() for param in wide.values])
    assert sum(map(bool, moved)) < len(moved)
    assert equal(*(list(_moments(each)) for each in (optimizer, reference)))  # float32 state is float32's all the same


def test_rests_that_are_dropped_would_be_seen() -> None:
    """The negative control of the law: one rest that is lost, once, and the values are float32's no more."""
    wide, half = Model(), Model()
    precision = convert(half)
    reference, optimizer = AdamW(wide.values), AdamW(half.values)
    alike = []
    for step in range(4):
        give_gradients(wide.values, step)
        give_gradients(half.values, step)
        if step == 2:
            precision._updates.storage.rests.drop(half.values[0])  # type: ignore[union-attr]
        reference.step()
        precision.optimizer_step(optimizer, half, None)
        exact = [param.detach() for param in wide.values]
        alike.append([equal([a], [b]) for a, b in zip(masters(precision, half.values), exact, strict=True)])
    assert alike == [[True] * 6] * 2 + [[False] + [True] * 5] * 2


def test_state_in_bfloat16_is_rounded_once_a_step() -> None:
    half = Model()
    precision = convert(half, "params=bfloat16,master=float32,state=bfloat16")
    optimizer = AdamW(half.values, betas=(0.5, 0.5))
    values = [param.detach() for param in Model().values]
    moment = [torch.zeros_like(each) for each in values]
    for step in range(3):
        give_gradients(half.values, step)
        precision.optimizer_step(optimizer, half, None)
        for index, param in enumerate(half.values):
            exact = torch.lerp(moment[index].float(), param.grad.float(), 0.5)  # type: ignore[union-attr]
            moment[index] = exact.bfloat16()
            assert equal([optimizer.state[param]["exp_avg"]], [moment[index]])
    assert {value.dtype for state in optimizer.state.values() for value in state.values()} == {
        *(torch.float32, torch.bfloat16, torch.int16)  # the counter, the moments, the rest
    }


def test_pieces_are_multiples_of_64_and_small() -> None:
    half = Model()
    precision, optimizer = convert(half), AdamW(half.values)
    seen: list[list[int]] = []

    def watched(group: dict[str, Any], *args: Any) -> Any:
        seen.append([param.numel() for param in group["params"]])
        return AdamW._init_group(optimizer, group, *args)

    optimizer._init_group = watched  # type: ignore[method-assign]
    give_gradients(half.values, 0)
    precision.optimizer_step(optimizer, half, None)
    total = sum(param.numel() for param in half.values)
    assert sum(map(sum, seen)) == total and max(map(sum, seen)) <= total / 32
    ends = {param.numel() % 64 for param in half.values}
    sizes = [size for batch in seen for size in batch]
    assert {size % 64 for size in sizes} <= {0, *ends} and len(sizes) > len(half.values)


def test_parameters_in_float32_and_without_gradients_are_the_optimizers_own() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    precision = HalfPrecision("bf16-master; 1: 32-true")
    precision.convert_module(model)
    optimizer = SGD(model.parameters(), lr=0.5)
    give_gradients(model.parameters(), 0)
    model[2].bias.grad = None
    before = [param.detach().float().clone() for param in model.parameters()]
    precision.optimizer_step(optimizer, model, None)
    for param, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(param.float(), old) == (param.grad is None)
    assert [param for param in optimizer.state if "master_rest" in optimizer.state[param]] == [
        param for param in model.parameters() if param.dtype is torch.bfloat16
    ]
    assert torch.equal(model[1].weight, before[2] - 0.5 * model[1].weight.grad)


def test_sparse_gradients_and_parameters_with_gaps_step_whole() -> None:
    values, dense = torch.randn(6, 4), torch.randn(6, 8)
    model = nn.Module()
    model.table, model.gaps = nn.Parameter(values.clone()), nn.Parameter(dense.clone()[:, ::2])
    reference = [nn.Parameter(values.clone()), nn.Parameter(dense[:, ::2].clone())]
    precision = convert(model)
    model.gaps.data = torch.empty(6, 8, dtype=torch.bfloat16)[:, ::2].copy_(model.gaps.data)
    rest = precision._updates.storage.rests  # type: ignore[union-attr]
    rest.put(model.gaps, rest._entries[model.gaps][0])
    optimizer, wide = SGD(model.parameters(), lr=0.1, momentum=0.9), SGD(reference, lr=0.1, momentum=0.9)
    for _ in range(2):
        sparse = torch.sparse_coo_tensor([[1, 4]], torch.ones(2, 4), (6, 4), check_invariants=True)
        model.table.grad, reference[0].grad = sparse.bfloat16(), sparse
        model.gaps.grad, reference[1].grad = torch.ones(6, 4, dtype=torch.bfloat16), torch.ones(6, 4)
        precision.optimizer_step(optimizer, model, None)
        wide.step()
    assert not model.gaps.is_contiguous()
    assert equal(masters(precision, model.parameters()), [param.detach() for param in reference])
