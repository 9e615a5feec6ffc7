"""Converting modules in place: objects, ties, flags, hooks and gradients stay; values are torch's own casts."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn

from precision_core import DoublePrecision, Precision
from precision_core.precision.model.cast_module import cast_buffers, cast_parameters
from precision_core.precision.model.report import Item

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def convert(module: nn.Module, dtype: torch.dtype) -> tuple[list[Item], list[str]]:
    items = cast_parameters(module, lambda name, param: dtype)
    more, changed = cast_buffers(module, lambda name, buffer: dtype)
    return items + more, changed


class Zoo(nn.Module):
    """Parameters and buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.tied = nn.Linear(3, 2, bias=False)
        self.tied.weight = self.layer.weight
        self.frozen = nn.Parameter(torch.rand(2), requires_grad=False)
        self.wave = nn.Parameter(torch.rand(2, dtype=torch.complex64))
        self.packed = nn.Parameter(torch.tensor([1, 2], dtype=torch.int8), requires_grad=False)
        self.eighth = nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn), requires_grad=False)
        self.nothing = nn.Parameter(torch.empty(0))
        self.register_parameter("none", None)
        self.register_buffer("table", torch.tensor([0.1, 1.0]))
        self.register_buffer("phase", torch.tensor([0.1j]))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("mask", torch.tensor([True]))
        self.register_buffer("hidden", torch.tensor([0.5]), persistent=False)
        self.register_buffer("missing", None)
        self.layer.register_buffer("shared", self.table)


@pytest.mark.parametrize("dtype", [F64, BF16, F16], ids=str)
def test_every_kind_of_tensor(dtype: torch.dtype) -> None:
    zoo = Zoo()
    before = copy.deepcopy(zoo)
    params, names = dict(zoo.named_parameters()), list(zoo.state_dict())
    items, changed = convert(zoo, dtype)
    complex_dtype = torch.complex128 if dtype is F64 else torch.complex64
    expected = {
        **dict.fromkeys(("layer.weight", "layer.bias", "frozen", "nothing", "table", "hidden"), dtype),
        **dict.fromkeys(("wave", "phase"), complex_dtype),
        "packed": torch.int8,
        "eighth": torch.float8_e4m3fn,
        "count": torch.int64,
        "mask": torch.bool,
    }
    tensors = {**dict(zoo.named_parameters()), **dict(zoo.named_buffers())}
    assert {name: tensor.dtype for name, tensor in tensors.items()} == expected
    old = {**dict(before.named_parameters()), **dict(before.named_buffers())}
    for name, tensor in tensors.items():
        assert torch.equal(tensor.to(torch.complex128), old[name].to(expected[name]).to(torch.complex128))
        assert tensor.requires_grad == old[name].requires_grad and tensor.is_leaf
    assert {item.name for item in items} == {name for name in expected if expected[name] is not old[name].dtype}
    assert changed == ([] if dtype is F64 else ["table"])
    assert dict(zoo.named_parameters()).keys() == params.keys()
    assert all(param is params[name] for name, param in zoo.named_parameters())  # the same objects
    assert zoo.tied.weight is zoo.layer.weight and zoo.layer.shared is zoo.table
    assert list(zoo.state_dict()) == names and zoo.none is None and zoo.missing is None
    assert convert(zoo, dtype) == ([], [])  # again: nothing to do


def test_dtypes_may_differ_by_name_and_none_leaves_alone() -> None:
    zoo = Zoo()
    items = cast_parameters(zoo, lambda name, param: {"layer.bias": F64, "frozen": BF16}.get(name))
    assert items == [Item("frozen", "float32 -> bfloat16"), Item("layer.bias", "float32 -> float64")]
    items, changed = cast_buffers(zoo, lambda name, buffer: F16 if name == "hidden" else None)
    assert (items, changed) == ([Item("hidden", "float32 -> float16")], []) and zoo.table.dtype is F32


def test_an_optimizer_made_before_trains_on_with_gradients_in_the_new_dtype() -> None:
    module = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9)
    module(torch.ones(1, 3)).sum().backward()
    DoublePrecision().convert_module(module)
    assert module.weight.grad is not None and module.weight.grad.dtype is F64
    assert torch.equal(module.weight.grad, torch.ones(2, 3, dtype=F64))
    before = module.weight.detach().clone()
    module(torch.ones(1, 3, dtype=F64)).sum().backward()  # accumulates onto the cast gradient
    optimizer.step()
    assert torch.equal(module.weight.detach(), before - 0.5 * 2)


def test_flags_hooks_layout_and_classes_stay() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Dropout(), nn.Linear(2, 2)).to(memory_format=torch.channels_last)
    module[1].eval()
    module[2].requires_grad_(False)
    calls: list[str] = []
    module.register_forward_hook(lambda *_: calls.append("forward"))
    module[0].weight.register_hook(lambda gradient: calls.append(str(gradient.dtype)))
    strides = module[0].weight.stride()
    convert(module, F64)
    assert [child.training for child in module] == [True, False, True]
    assert [param.requires_grad for param in module.parameters()] == [True, True, False, False]
    assert module[0].weight.stride() == strides and type(module[0].weight) is nn.Parameter
    module(torch.rand(1, 3, 3, 3, dtype=F64)).sum().backward()
    assert calls == ["forward", "torch.float64"]


def test_shared_modules_and_their_buffers_stay_shared() -> None:
    norm = nn.BatchNorm1d(2)
    module = nn.ModuleDict({"a": norm, "b": norm})
    items, changed = convert(module, BF16)
    assert module["a"] is module["b"] and norm.running_var.dtype is BF16
    assert [item.name for item in items] == ["a.weight", "a.bias", "a.running_mean", "a.running_var"]
    assert changed == []  # zeros and ones lose nothing


def test_meta_modules_stay_meta() -> None:
    module = nn.BatchNorm1d(3, device="meta")
    _, changed = convert(module, BF16)
    assert {tensor.dtype for tensor in (module.weight, module.running_mean)} == {BF16}
    assert module.weight.is_meta and module.running_mean.is_meta
    assert changed == ["running_mean", "running_var"]  # who knows their values


def test_lazy_modules_take_the_dtype_when_they_are_made() -> None:
    module = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    DoublePrecision().convert_module(module)
    assert module(torch.rand(4, 5, dtype=F64)).dtype is F64
    assert {tensor.dtype for tensor in module.state_dict().values()} == {F64, torch.int64}


def test_recurrent_layers_run_after_the_cast() -> None:
    layer = nn.LSTM(3, 4, num_layers=2, batch_first=True)
    expected = copy.deepcopy(layer).double()
    convert(layer, F64)
    x = torch.rand(2, 5, 3, dtype=F64)
    assert torch.equal(layer(x)[0], expected(x)[0])


# values, and whether bfloat16 and float16 lose by them
LOSSES: list[tuple[Any, bool, bool]] = [
    ([0.0, 1.0, -2.5, 1 / 256], False, False),
    ([0.1], True, True),
    ([257.0], True, False),
    ([1e5], True, True),
    ([65536.0], False, True),  # float16 overflows
    ([2.0**-30], False, True),  # float16 underflows
    ([torch.finfo(F32).min], True, True),  # becomes -inf
    ([float("inf"), float("-inf"), float("nan")], False, False),
    ([float("nan"), 0.1], True, True),
    ([], False, False),
    (torch.tensor([[0.0, 0.1]]).to_sparse(), True, True),
    (torch.tensor([[0.0, 0.5]]).to_sparse(), False, False),
    (torch.tensor([0.1], dtype=F64), True, True),
    (torch.tensor([1e5], dtype=BF16), False, True),
    (torch.tensor([2.0**-14], dtype=F16), False, False),
]


@pytest.mark.parametrize(("values", "bfloat16", "float16"), LOSSES)
def test_a_buffer_is_named_when_its_values_change(values: Any, bfloat16: bool, float16: bool) -> None:
    for dtype, loses in ((BF16, bfloat16), (F16, float16), (F64, False)):
        module = nn.Module()
        module.register_buffer("table", values if isinstance(values, Tensor) else torch.tensor(values))
        assert convert(module, dtype)[1] == (["table"] if loses else [])
        assert module.table.dtype is dtype


@given(arrays(numpy.float32, 3, elements=st.floats(width=32)))
@settings(deadline=None)
def test_named_exactly_when_the_way_back_gives_other_values(array: numpy.ndarray[Any, Any]) -> None:
    for dtype in (BF16, F16):
        module = nn.Module()
        module.register_buffer("table", torch.from_numpy(array.copy()))
        _, changed = convert(module, dtype)
        back = module.table.to(F32).numpy()
        assert changed == ([] if numpy.array_equal(back, array, equal_nan=True) else ["table"])


def test_one_tensor_at_a_time() -> None:
    module, alive = nn.ModuleList(), weakref.WeakSet[Any]()
    for _ in range(4):
        memory = numpy.ones(64, numpy.float32).view(Memory)
        alive.add(memory)
        module.append(nn.Module())
        module[-1].weight = nn.Parameter(torch.from_numpy(memory))
    del memory
    left = []
    cast_parameters(module, lambda name, param: left.append(len(alive)) or F64)
    assert left == [4, 3, 2, 1] and len(alive) == 0  # each old one is gone before the next is cast


class Memory(numpy.ndarray):  # type: ignore[type-arg]
    """An array that a set can hold."""

    __hash__ = object.__hash__


def test_float32_is_a_conversion_too() -> None:
    module = nn.BatchNorm1d(3).double()
    module.weight.data.fill_(0.1)
    assert Precision().convert_module(module) is module
    assert {tensor.dtype for tensor in module.state_dict().values()} == {F32, torch.int64}
    assert torch.equal(module.weight.data, torch.full((3,), 0.1))
