"""What stays float32 in half modes: by the model's marks, by what it is, and not where the user says otherwise."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precision_core import Fabric, HalfPrecision
from precision_core.precision.model.default_dtype import created_as

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
MODES = {"bf16-true": BF16, "16-true": F16}


def set_up(mode: Any, model: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """Returns the model, set up, and why what was kept in float32 was."""
    fabric = Fabric(accelerator="cpu", precision=mode)
    model = fabric.setup(model)
    return model, {name: why.removeprefix("kept in float32: ") for name, why in fabric.precision_plugin.report.skipped}


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}


class Block(nn.Module):
    """As transformers' models: marks on the class, an output layer that the block casts its input for."""

    _keep_in_fp32_modules = ("wo", "scale")
    _keep_in_fp32_modules_strict = ("gate.weight",)

    def __init__(self) -> None:
        super().__init__()
        self.wo = nn.Linear(4, 4, bias=False)
        self.two = nn.Linear(4, 4, bias=False)  # "wo" is no part of its name, only of its letters
        self.gate = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(x.to(self.wo.weight.dtype)) * self.scale + self.gate(self.two(x))


@pytest.mark.parametrize("mode", MODES)
def test_what_a_model_marks_stays_float32(mode: str) -> None:
    exact, x = nn.Sequential(nn.Linear(4, 4), Block()), torch.linspace(-1, 1, 8).view(2, 4)
    model, why = set_up(mode, copy.deepcopy(exact))
    marked = {"1.gate.weight"} | ({"1.wo.weight", "1.scale"} if mode == "16-true" else set())
    assert set(why) == marked and set(why.values()) == {"the model marks it to stay so"}
    assert {name for name, dtype in dtypes(model).items() if dtype is F32} == marked
    assert torch.allclose(model(x).double(), exact.double()(x.double()), atol=0.02 if mode == "bf16-true" else 0.002)


def test_marks_hold_inside_of_the_module_that_has_them_and_upcast_what_arrives_narrow() -> None:
    model = nn.ModuleDict({"marked": Block().half(), "wo": nn.Linear(4, 4)})
    HalfPrecision("16-true").convert_module(model)
    assert model["wo"].weight.dtype is F16 and model["marked"].wo.weight.dtype is F32


@pytest.mark.parametrize("marks", [None, (), AttributeError(), "wo", {"wo": 1}], ids=str)
def test_marks_of_other_kinds(marks: Any) -> None:
    block = Block()
    vars(block).update(_keep_in_fp32_modules=marks, _keep_in_fp32_modules_strict=None)
    HalfPrecision("16-true").convert_module(block)
    assert block.wo.weight.dtype is (F32 if marks and not isinstance(marks, AttributeError) else F16)


class Parts(nn.Module):
    """One of each kind of the table, used as models use them: a table added, a mask on scores, a router's choice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.rnn = nn.Embedding(8, 8), nn.LayerNorm(8), nn.LSTM(8, 8, batch_first=True)
        self.convolution, self.statistics = nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8)
        self.weight = nn.Parameter(torch.linspace(-1, 1, 64).view(8, 8))
        self.register_buffer("table", torch.linspace(0, 1, 48).view(6, 8).sin(), persistent=False)
        self.register_buffer("mask", torch.full((6, 6), torch.finfo(F32).min).triu(1), persistent=False)
        self.register_buffer("inv_freq", 10000.0 ** -torch.linspace(0, 1, 4))
        self.register_buffer("correction_bias", torch.tensor([0.1, -0.1]))
        self.register_buffer("mean", torch.ones(8))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embedding(ids) + self.table)
        x = (x @ x.transpose(1, 2) + self.mask).softmax(-1) @ self.embedding(ids) + self.table
        x = nn.functional.scaled_dot_product_attention(x, self.embedding(ids), x @ self.weight, self.mask)
        x = self.rnn(x + self.table)[0] + self.table
        x = self.statistics(self.convolution(x.transpose(1, 2))).transpose(1, 2)
        out = torch.zeros_like(x)
        out[:, 0] = x[:, 0] + self.table[0]
        angles = 2000 * torch.arange(6).unsqueeze(1) * self.inv_freq  # far positions
        out = out.index_add(1, torch.arange(6), x + torch.cat([angles.sin(), angles.cos()], 1))
        return out * self.mean * (1 + self.correction_bias.argmax())


KEPT = {
    "table": "a table that the model computes itself and does not save (not persistent)",
    "mask": "a table that the model computes itself and does not save (not persistent)",
    "inv_freq": "rotary frequencies, whose rounding would turn far positions",
    "correction_bias": "a router's correction bias, whose rounding would send tokens to other experts",
    **dict.fromkeys(
        ("statistics.weight", "statistics.bias", "statistics.running_mean", "statistics.running_var"),
        "running statistics, which small updates would not move in a half dtype, and their layer's weights",
    ),
}


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_tables_statistics_and_router_biases_stay_and_the_model_runs_with_them(mode: str, trains: bool) -> None:
    torch.manual_seed(0)
    exact = Parts().train(trains)
    ids = torch.randint(8, (2, 6))
    model, why = set_up(mode, copy.deepcopy(exact))
    assert why == KEPT and {name for name, dtype in dtypes(model).items() if dtype is F32} == set(KEPT)
    output = model(ids)
    expected = exact.double()(ids)
    assert output.dtype is F32
    assert (output - expected).abs().max() < {"bf16-true": 0.1, "16-true": 0.01}[mode]
    output.sum().backward()
    assert all(param.grad is not None and param.grad.isfinite().all() for param in model.parameters())
    assert model.weight.grad.dtype is MODES[mode] and model.statistics.weight.grad.dtype is F32


@pytest.mark.usefixtures("true_modes_compile")
def test_compiled_it_computes_what_it_computes_eagerly() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    model, ids = set_up("bf16-true", Parts().eval())[0], torch.randint(8, (2, 6))
    with torch.no_grad():
        expected = model(ids)
        assert torch.allclose(torch.compile(model, backend="eager")(ids), expected, atol=1e-6)


def test_tables_that_arrive_narrow_stay_as_the_mode_says() -> None:
    model = Parts().bfloat16()
    _, why = set_up("bf16-true", model)
    assert {"table", "mask", "inv_freq"}.isdisjoint(why) and model.table.dtype is BF16  # what was lost stays lost
    assert model.statistics.weight.dtype is model.correction_bias.dtype is F32


@pytest.mark.parametrize(
    ("precision", "narrow"),
    [
        ("bf16-true; statistics: bf16-true", {name for name in KEPT if "statistics" in name}),
        ("16-true; inner: 16-true", {f"inner.{name}" for name in KEPT}),
        ("bf16-true; inner: params=bfloat16,compute=bfloat16,buffers=float32", {f"inner.{name}" for name in KEPT}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*casts buffers")
def test_an_exception_of_the_user_wins(precision: str, narrow: set[str]) -> None:
    model: nn.Module = Parts()
    if "inner" in precision:
        model = nn.ModuleDict({"inner": model, "other": Parts()})
    plugin = HalfPrecision(precision)
    plugin.convert_module(model)
    why = {name for name, _ in plugin.report.skipped if name in dtypes(model)}
    every = set(KEPT) if isinstance(model, Parts) else {f"{part}.{name}" for part in model for name in KEPT}
    assert why == every - narrow


def test_buffers_of_the_call_win() -> None:
    model = Parts()
    with pytest.warns(UserWarning, match="running statistics: table, mask"):
        plugin = HalfPrecision("bf16-true", buffers="bfloat16")
        plugin.convert_module(model)
    assert F32 not in dtypes(model).values() and plugin.report.skipped == ()


def test_a_tensor_that_two_modules_hold_stays_in_both() -> None:
    block = Block()
    model = nn.ModuleDict({"first": nn.Linear(4, 4, bias=False), "block": block})
    model["first"].weight = block.wo.weight
    _, why = set_up("16-true", model)
    assert {"first.weight", "block.wo.weight"} <= set(why) and model["first"].weight is block.wo.weight


X, W = torch.linspace(-1, 1, 16).view(4, 4), torch.linspace(0, 1, 16).view(4, 4)

CALLS = {
    "matmul": lambda x, w: x @ w,
    "linear": lambda x, w: nn.functional.linear(x, w),
    "addmm": lambda x, w: torch.addmm(x, x, w),
    "einsum": lambda x, w: torch.einsum("ij,jk->ik", x, w),
    "bmm": lambda x, w: torch.bmm(x[None], w[None])[0],
    "prelu": lambda x, w: nn.functional.prelu(x, w[0]),
    "layer_norm": lambda x, w: nn.functional.layer_norm(x, (4,), w[0]),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_products_take_operands_of_several_dtypes_where_something_is_wide(call: Any) -> None:
    with created_as(BF16, aligns=True):
        narrow = call(X, W.bfloat16())  # no parameter among them: as the mode says
        expected = call(X.bfloat16(), W.bfloat16())
        wide = nn.functional.linear(X.bfloat16(), nn.Parameter(W))  # a parameter's own dtype
    assert narrow.dtype is expected.dtype is BF16 and torch.equal(narrow, expected)
    assert wide.dtype is F32 and torch.equal(wide, nn.functional.linear(X.bfloat16().float(), W))


def test_what_torch_takes_in_two_dtypes_stays_as_it_is() -> None:
    with created_as(BF16, aligns=True):
        assert (X.bfloat16() + W).dtype is F32
        assert nn.functional.layer_norm(X.bfloat16(), (4,), nn.Parameter(W[0])).dtype is BF16
        assert (X @ W).dtype is F32  # alike
    with created_as(BF16), pytest.raises(RuntimeError, match="same dtype"):
        X.bfloat16() @ W


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_weights_of_a_norm_follow_its_statistics(kind: Any) -> None:
    """As under an engine that stores all parameters alike."""
    norm, exact = (kind(4, affine=True, track_running_stats=True) for _ in range(2))
    for each in (norm, exact):
        nn.init.constant_(each.weight, 1.5)
    norm.weight.data, norm.bias.data = norm.weight.data.bfloat16(), norm.bias.data.bfloat16()
    x = torch.arange(32.0).view(2, 4, 4)
    with created_as(BF16, aligns=True):
        output = norm(x.bfloat16())
    assert torch.equal(output, exact(x.bfloat16().float()).bfloat16()) and output.dtype is BF16
    assert torch.equal(norm.running_mean, exact.running_mean) and norm.running_mean.dtype is F32
    output.sum().backward()
    assert norm.weight.grad.dtype is BF16
