"""The base plugin's hooks: conversion, inputs, outputs, and the contexts in which modules and tensors are made."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import nn

from precision_core import DoublePrecision, Fabric, HalfPrecision, MixedPrecision, Policy, Precision

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

PLUGINS: dict[str, Any] = {
    "32-true": Precision,
    "64-true": DoublePrecision,
    "bf16-true": lambda: HalfPrecision("bf16-true"),
    "16-true": lambda: HalfPrecision("16-true"),
    "bf16-mixed": lambda: MixedPrecision("bf16-mixed", device="cpu"),
    "16-mixed": lambda: MixedPrecision("16-mixed", device="cpu"),
}
DTYPES = {"32-true": F32, "64-true": F64, "bf16-true": BF16, "16-true": F16, "bf16-mixed": F32, "16-mixed": F32}


class Rotary(nn.Module):
    """A layer with a position table, as transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4, dtype=F32))
        self.codes = nn.Parameter(torch.ones(4, dtype=torch.int32), requires_grad=False)
        self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(0, 64, 2) / 64))
        self.register_buffer("table", torch.outer(torch.arange(5000.0), self.inv_freq).sin())


def test_a_hand_written_float32_loop_is_plain_torch_bit_for_bit() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    plain = copy.deepcopy(module)
    precision = Precision()
    precision.convert_module(module)
    optimizer, plain_optimizer = (torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (module, plain))
    for x in torch.rand(5, 4, 3, dtype=F64):
        with precision.forward_context():
            loss = precision.convert_output(module(precision.convert_input(x))).square().mean()
        loss = precision.pre_backward(loss, module)
        precision.backward(loss, module)
        loss = precision.post_backward(loss, module)
        precision.optimizer_step(optimizer, module, None)
        optimizer.zero_grad()
        plain_loss = plain(x.float()).square().mean()
        plain_loss.backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
        assert torch.equal(loss, plain_loss)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("mode", PLUGINS)
def test_inputs_are_cast_in_true_modes_and_kept_in_mixed_ones(mode: str) -> None:
    precision = PLUGINS[mode]()
    x, ids = torch.tensor([1001.1, 0.1], dtype=F64), torch.tensor([70_000])
    args, kwargs = precision.convert_input((([x], ids), {"a": {"x": x}, "name": "text"}))
    if "mixed" in mode:
        assert args[0][0] is x and kwargs["a"]["x"] is x
    else:
        assert args[0][0] is kwargs["a"]["x"] and torch.equal(args[0][0], x.to(DTYPES[mode]))
        assert args[0][0].dtype is DTYPES[mode]
    assert args[1] is ids and kwargs["name"] == "text"


@pytest.mark.parametrize("mode", PLUGINS)
def test_outputs_of_its_own_dtypes_are_cast_and_others_come_as_they_are(mode: str) -> None:
    precision = PLUGINS[mode]()
    policy = precision.policy
    for dtype in (F64, F32, BF16, F16, torch.int64, torch.complex64):
        x = torch.tensor([1, 2]).to(dtype)
        expected = policy.output if dtype in (policy.params, policy.compute) else dtype
        for out in (precision.convert_output(x), precision.convert_output({"a": (x,), "b": None})["a"][0]):
            assert out.dtype is expected and torch.equal(out, x.to(expected))
    assert precision.convert_output(None) is None
    assert precision.convert_output("text") == "text"


def test_output_dtype_is_the_policys() -> None:
    precision = HalfPrecision("params=bfloat16,output=bfloat16")
    assert precision.convert_output(torch.ones(1, dtype=BF16)).dtype is BF16
    assert DoublePrecision(policy="params=float64,output=float32").convert_output(torch.ones(1, dtype=F64)).dtype is F32


@pytest.mark.parametrize("mode", PLUGINS)
def test_storage(mode: str) -> None:
    precision = PLUGINS[mode]()
    for dtype in (F64, F32, BF16, F16, torch.complex64):
        assert precision.storage(nn.Parameter(torch.ones(1, dtype=dtype))) is DTYPES[mode]
    for dtype in (torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn):
        assert precision.storage(nn.Parameter(torch.ones(1).to(dtype), requires_grad=False)) is None


@pytest.mark.parametrize("mode", PLUGINS)
def test_modules_are_born_in_the_dtype_with_their_tables_unspoilt(mode: str) -> None:
    with PLUGINS[mode]().module_init_context():
        module = Rotary()
    assert {name: param.dtype for name, param in module.named_parameters()} == {
        **dict.fromkeys(("linear.weight", "linear.bias", "scale"), DTYPES[mode]),
        "codes": torch.int32,
    }
    assert module.linear.weight.requires_grad and module.linear.weight.float().std() > 0.1
    plain = Rotary()
    assert torch.equal(module.inv_freq, plain.inv_freq) and torch.equal(module.table, plain.table)
    assert plain.linear.weight.dtype is F32  # outside again


@pytest.mark.parametrize("mode", PLUGINS)
@pytest.mark.parametrize("default", [BF16, F64], ids=str)
def test_modules_are_born_alike_whatever_the_process_default_dtype_is(mode: str, default: torch.dtype) -> None:
    def born() -> Rotary:
        torch.manual_seed(0)
        with PLUGINS[mode]().module_init_context():
            return Rotary()

    expected = born()
    torch.set_default_dtype(default)
    try:
        module = born()
    finally:
        torch.set_default_dtype(F32)
    for (name, tensor), other in zip(module.state_dict().items(), expected.state_dict().values(), strict=True):
        assert tensor.dtype is other.dtype and torch.equal(tensor, other), name


def test_float64_parameters_are_drawn_in_float64() -> None:
    with DoublePrecision().module_init_context():
        weight = nn.Linear(64, 64).weight
    assert not torch.equal(weight, weight.float().double())


def test_with_exceptions_modules_are_born_in_the_widest_dtype() -> None:
    precision = HalfPrecision("bf16-true; 1: 32-true")
    values = torch.tensor([[0.1]])
    with precision.module_init_context():
        module = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        module[0].load_state_dict({"weight": values, "bias": values[0]})
        module[1].load_state_dict({"weight": values, "bias": values[0]})
    precision.convert_module(module)
    assert torch.equal(module[0].weight, values.to(BF16)) and torch.equal(module[1].weight, values)


def test_init_contexts_nest_restore_and_leave_other_threads_alone() -> None:
    dtypes: list[torch.dtype] = []
    inside, done = threading.Event(), threading.Event()

    def work() -> None:
        inside.wait(60)
        dtypes.append(nn.Linear(1, 1).weight.dtype)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    with pytest.raises(KeyError), HalfPrecision("bf16-true").module_init_context():
        with DoublePrecision().module_init_context():
            inside.set()
            assert done.wait(60) and nn.Linear(1, 1).weight.dtype is F64
        assert nn.Linear(1, 1).weight.dtype is BF16
        raise KeyError
    thread.join()
    assert dtypes == [F32] and nn.Linear(1, 1).weight.dtype is F32


@pytest.mark.parametrize("mode", PLUGINS)
def test_tensors_are_made_in_the_dtype_that_inputs_are_cast_to(mode: str) -> None:
    with PLUGINS[mode]().tensor_init_context():
        made = (torch.zeros(1), torch.tensor([0.1]), torch.arange(4) / 3)
    assert {each.dtype for each in made} == {DTYPES[mode]} and torch.zeros(1).dtype is F32
    assert torch.zeros(1, dtype=F16).dtype is F16


@pytest.mark.parametrize("plugin", [Precision, DoublePrecision])
@pytest.mark.parametrize("mode", ["64-true", "32-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed"])
def test_a_policy_for_another_plugin_is_refused_by_the_name_of_that_plugin(plugin: Any, mode: str) -> None:
    runs = {Precision: "32-true", DoublePrecision: "64-true"}[plugin]
    if mode == runs:
        assert plugin(policy=mode).policy == Policy.parse(mode)
        return
    with pytest.raises(ValueError) as error:
        plugin(policy=mode)
    runner = type(PLUGINS[mode]()).__name__
    message = f"{plugin.__name__}({mode!r}): this plugin runs {runs}; for this policy there is {runner}"
    assert str(error.value) == message


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_created_tensors_do_not_follow_the_process_default_dtype(default: torch.dtype) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, x: torch.Tensor) -> Any:
            return self.layer(x), torch.arange(4) / 3, torch.zeros(2), torch.tensor([0.1]), torch.full((1,), 1e30)

    expected = Model()(torch.ones(1))[1:]
    torch.set_default_dtype(default)
    try:
        _, *created = Fabric(accelerator="cpu").setup(Model())(torch.ones(1))
    finally:
        torch.set_default_dtype(torch.float32)
    for mine, theirs in zip(created, expected, strict=True):
        assert mine.dtype is torch.float32 and torch.equal(mine, theirs)
