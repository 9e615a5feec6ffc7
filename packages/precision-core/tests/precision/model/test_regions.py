"""Exceptions: modules under a policy of their own, against the same computation written by hand."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precision_core import HalfPrecision, MixedPrecision, Precision

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
HALF = "bf16-true; *.norm: 32-true"
MIXED = "bf16-mixed; *.norm: 32-true; lm_head: params=float32,compute=bfloat16"


class Recorder(nn.Module):
    """Stands for any module: notes what it takes, computes with, creates and gives."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.seen: dict[str, torch.dtype] = {}

    def forward(self, x: Tensor) -> Tensor:
        product = torch.eye(2, device=x.device, dtype=F32).to(x.dtype) @ torch.ones(2, 2).to(x.dtype)
        y = self.layer(x)
        self.seen = {"takes": x.dtype, "product": product.dtype, "creates": torch.zeros(1).dtype, "gives": y.dtype}
        return y


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Recorder(nn.LayerNorm(8))
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.stream = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.stream = x + self.down(self.up(self.norm(x)).relu() * torch.ones(16))
        return self.stream


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = Recorder(nn.LayerNorm(8))
        self.lm_head = nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + torch.arange(ids.shape[1])[:, None] / 7
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


IDS = torch.arange(10).view(2, 5)


def make(mode: str, model: nn.Module | None = None) -> tuple[Precision, Any, Callable[..., Any]]:
    """Returns plugin, converted model, and the model's forward under the plugin's hooks."""
    if model is None:
        torch.manual_seed(0)
        model = GPT()
    plugin = MixedPrecision(mode, device="cpu") if "mixed" in mode.split(";")[0] else HalfPrecision(mode)
    plugin.convert_module(model)

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = plugin.convert_input((args, kwargs))
        with plugin.forward_context():
            output = model(*args, **kwargs)
        return plugin.convert_output(output)

    return plugin, model, forward


def half_by_hand(model: Any, ids: Tensor) -> Tensor:
    """bf16-true; *.norm: 32-true, with every cast written out; the parameters are as the plugin stores them."""

    def linear(x: Tensor, layer: nn.Linear) -> Tensor:
        return F.linear(x.to(BF16), layer.weight, layer.bias)

    def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
        return F.layer_norm(x.float(), (8,), layer.weight, layer.bias)

    x = F.embedding(ids, model.embedding.weight) + (torch.arange(5)[:, None] / 7).to(BF16)
    for block in model.blocks:
        inner = linear(norm(x, block.norm.layer), block.up).relu() * torch.ones(16, dtype=BF16)
        x = x + linear(inner, block.down)
    return linear(norm(x, model.norm.layer), model.lm_head).float()


def mixed_by_hand(model: Any, ids: Tensor) -> Tensor:
    def linear(x: Tensor, layer: nn.Linear) -> Tensor:
        return F.linear(x.to(BF16), layer.weight.to(BF16), layer.bias.to(BF16))

    def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
        return F.layer_norm(x.float(), (8,), layer.weight, layer.bias)

    x = F.embedding(ids, model.embedding.weight) + torch.arange(5)[:, None] / 7
    for block in model.blocks:
        x = x + linear(linear(norm(x, block.norm.layer), block.up).relu() * torch.ones(16), block.down)
    return linear(norm(x, model.norm.layer), model.lm_head).float()


@pytest.mark.parametrize(("mode", "by_hand"), [(HALF, half_by_hand), (MIXED, mixed_by_hand)])
def test_values_and_gradients_are_those_of_the_casts_written_by_hand(mode: str, by_hand: Callable[..., Any]) -> None:
    plugin, model, forward = make(mode)
    twin = copy.deepcopy(model)
    output, expected = forward(IDS), by_hand(twin, IDS)
    assert output.dtype is F32 and torch.equal(output, expected)
    for loss in (output, expected):
        plugin.backward(F.cross_entropy(loss.flatten(0, 1), IDS.flatten()), model)
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None, name
        assert mine.grad.dtype is mine.dtype is theirs.dtype and torch.equal(mine.grad, theirs.grad), name


# the stored dtype of norms and of the rest; what a norm takes, multiplies in, creates and gives; the residual stream
DTYPES = [
    (HALF, F32, BF16, (F32, F32, F32, F32), BF16),
    (MIXED, F32, F32, (F32, F32, F32, F32), F32),
    ("bf16-true; *.norm: params=float32,output=bfloat16", F32, BF16, (F32, F32, F32, F32), BF16),
    ("bf16-true; *.norm: bf16-mixed", F32, BF16, (F32, BF16, F32, F32), BF16),
    ("bf16-true; *.norm: 64-true", F64, BF16, (F64, F64, F64, F64), BF16),
    ("bf16-true; *.norm: 16-true", F16, BF16, (F16, F16, F16, F16), BF16),
    ("bf16-mixed; *.norm: params=float64,output=float32", F64, F32, (F64, F64, F64, F64), F32),
    ("bf16-mixed; *.norm: bf16-true", BF16, F32, (BF16, BF16, BF16, BF16), F32),
    ("bf16-mixed; *.norm: params=float32,compute=float16,scale=false", F32, F32, (F32, F16, F32, F32), F32),
    ("16-mixed; *.norm: 32-true", F32, F32, (F32, F32, F32, F32), F32),
]


@pytest.mark.parametrize(("mode", "stored", "rest", "inside", "stream"), DTYPES, ids=[row[0] for row in DTYPES])
def test_dtypes_inside(mode: str, stored: Any, rest: Any, inside: Any, stream: Any) -> None:
    _, model, forward = make(mode)
    output = forward(IDS)
    assert {name: param.dtype for name, param in model.named_parameters()} == {
        name: stored if "norm" in name else rest for name, _ in model.named_parameters()
    }
    for norm in (model.norm, model.blocks[1].norm):
        assert tuple(norm.seen.values()) == inside
    assert model.blocks[0].stream.dtype is stream and output.dtype is F32
    assert torch.zeros(1).dtype is F32 and not torch.is_autocast_enabled("cpu")  # nothing is left behind


@pytest.mark.parametrize(
    ("exception", "expected"), [("32-true", F32), ("params=float32,output=bfloat16", BF16), ("64-true", F64)]
)
@pytest.mark.parametrize("base", ["bf16-true", "bf16-mixed"])
def test_a_regions_output_dtype(base: str, exception: str, expected: torch.dtype) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.out = self.layer(x)
            return self.out

    _, model, forward = make(f"{base}; layer: {exception}", Model())
    output = forward(torch.ones(1, 2))
    assert model.out.dtype is expected and output.dtype is (F64 if expected is F64 else F32)


def test_the_first_exception_wins_and_regions_lie_inside_regions() -> None:
    mode = "bf16-true; blocks.1.norm: 64-true; blocks.1: 32-true; *.norm: bf16-mixed; blocks.0: params=bfloat16"
    _, model, forward = make(mode)
    forward(IDS)
    assert model.blocks[1].norm.seen == dict.fromkeys(("takes", "product", "creates", "gives"), F64)
    assert model.blocks[1].up.weight.dtype is F32 and model.blocks[1].stream.dtype is F32
    assert tuple(model.norm.seen.values()) == tuple(model.blocks[0].norm.seen.values()) == (F32, BF16, F32, F32)
    assert model.blocks[0].up.weight.dtype is BF16


@pytest.mark.parametrize("mode", [HALF, MIXED])
def test_a_copy_keeps_the_precision_and_a_pickle_is_plain(mode: str) -> None:
    plugin, model, forward = make(mode)
    twin, reference = copy.deepcopy(model), GPT()
    reference.load_state_dict(model.state_dict())
    expected = forward(IDS)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()  # the copy runs its own weights
        with plugin.forward_context():
            assert torch.equal(plugin.convert_output(twin(IDS)), expected)
    plain = pickle.loads(pickle.dumps(twin))
    assert all(module.forward.__func__ is type(module).forward for module in plain.modules())
    plain.float()
    assert torch.equal(plain(IDS), reference(IDS))


@pytest.mark.parametrize("mode", [HALF, MIXED])
def test_teardown_gives_the_modules_their_own_forward_back(mode: str) -> None:
    plugin, model, _ = make(mode)
    assert any("forward" in module.__dict__ for module in model.modules())
    plugin.teardown()
    assert not any("forward" in module.__dict__ for module in model.modules())
    x = torch.arange(8.0)[None]
    assert model.norm(x).dtype is F32 and torch.equal(model.norm(x), F.layer_norm(x, (8,)))


@pytest.mark.usefixtures("true_modes_compile")
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "mode",
    [
        HALF,
        MIXED,
        pytest.param("bf16-true; lm_head: bf16-mixed; blocks: 32-true; embedding: 64-true", marks=pytest.mark.full),
    ],
)
def test_compiled_in_one_graph(mode: str, backend: str) -> None:
    torch._dynamo.reset()
    plugin, model, forward = make(mode)
    expected = forward(IDS)
    gradient = torch.autograd.grad(expected.sum(), model.lm_head.weight)[0]
    whole = torch.compile(forward, fullgraph=True, backend=backend)(IDS)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with plugin.forward_context():
        inner = plugin.convert_output(compiled(IDS))
    for output in (whole, inner):
        assert output.dtype is F32 and torch.equal(output, expected)
        assert torch.equal(torch.autograd.grad(output.sum(), model.lm_head.weight)[0], gradient)
