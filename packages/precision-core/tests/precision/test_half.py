"""Half precision in a hand-written loop: dtypes, the warning about buffers, and its ways out."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precision_core import HalfPrecision, Policy

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
MODES = {"bf16-true": BF16, "16-true": F16}


def convert(precision: HalfPrecision, module: nn.Module) -> list[str]:
    """Converts and returns the messages of its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert precision.convert_module(module) is module
    assert all(warning.category is UserWarning and warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


def named(message: str) -> list[str]:
    """Returns the buffers that the warning names."""
    return re.search(r"running statistics: (.*?)\. To keep them", message)[1].split(", ")  # type: ignore[index]


def call(precision: HalfPrecision, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = precision.convert_input((args, kwargs))
    with precision.forward_context():
        output = module(*args, **kwargs)
    return precision.convert_output(output)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.linear = nn.Linear(4, 3)
        self.register_buffer("ones", torch.ones(4))
        self.seen: list[torch.dtype] = []

    def forward(self, ids: Tensor, extra: dict[str, Any], *, mask: Tensor) -> dict[str, Any]:
        made = (torch.zeros(4), torch.tensor(0.1), torch.arange(4) / 3, torch.full((4,), 0.1))
        x = self.embedding(ids) * self.ones + sum(made) + extra["x"][0] * mask
        self.seen = [each.dtype for each in (*made, extra["x"][0], mask, x)]
        return {"logits": self.linear(x), "hidden": [x], "ids": ids, "name": "model"}


@pytest.mark.parametrize("mode", MODES)
def test_dtypes_on_the_way_through(mode: str) -> None:
    dtype, precision, model = MODES[mode], HalfPrecision(mode), Model()
    weight = model.linear.weight.detach().clone()
    assert convert(precision, model) == []  # ones lose nothing
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}
    assert torch.equal(model.linear.weight, weight.to(dtype))
    ids, x, mask = torch.arange(3), torch.linspace(0, 1, 4, dtype=F64), torch.tensor([True, False, True, True])
    output = call(precision, model, ids, {"x": [x]}, mask=mask)
    assert model.seen == [dtype] * 5 + [torch.bool, dtype]
    assert (output["logits"].dtype, output["hidden"][0].dtype) == (F32, F32) and output["ids"] is ids
    precision.backward(output["logits"].sum(), model)
    assert {param.grad.dtype for param in model.parameters() if param.grad is not None} == {dtype}
    expected = (output["hidden"][0].double() @ weight.double().T + model.linear.bias.double()).float()
    assert torch.allclose(output["logits"], expected, rtol=2 ** (-6 if dtype is BF16 else -9), atol=2**-8)


@pytest.mark.parametrize("mode", ["64-true", "32-true", "16-mixed", "bf16-mixed", 16, 32, 64, "16", "32", "64", "bf16"])
def test_other_modes_are_refused_by_the_name_of_their_plugin(mode: str | int) -> None:
    policy = Policy.parse(mode)
    runner = "MixedPrecision" if policy.mixed else "DoublePrecision" if policy.params is F64 else "Precision"
    with pytest.raises(ValueError) as error:
        HalfPrecision(mode)
    runs = "16-true, bf16-true, 16-master, bf16-master, bf16-stochastic"
    call = f"HalfPrecision({str(policy)!r})"
    assert str(error.value) == f"{call}: this plugin runs {runs}; for this policy there is {runner}"


class Tables(nn.Module):
    """Buffers that lose by the cast, and buffers that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.inner = nn.Module()
        self.inner.register_buffer("weights", 1 / 10000 ** (torch.arange(4) / 4))
        self.register_buffer("powers", 2.0 ** torch.arange(4))
        self.register_buffer("mean", torch.tensor([0.485, 0.456]))
        self.register_buffer("count", torch.tensor(70_001))
        self.register_buffer("wave", torch.tensor([0.1j]))


@pytest.mark.parametrize("mode", MODES)
def test_one_warning_names_exactly_the_buffers_that_lose_and_running_statistics(mode: str) -> None:
    model = Tables()
    (message,) = convert(HalfPrecision(mode), model)
    assert named(message) == ["mean", "inner.weights"]
    assert f"{mode} casts buffers to {str(MODES[mode])[6:]}" in message
    assert f'HalfPrecision("{mode}", buffers="float32"), or buffers={{name patterns}}' in message
    assert model.count == 70_001 and model.wave.dtype is torch.complex64 and model.inner.weights.dtype is MODES[mode]
    (again,) = convert(HalfPrecision(mode, buffers=MODES[mode]), model)  # now only these can still be lost
    assert named(again) == ["norm.running_mean", "norm.running_var"]


@pytest.mark.parametrize(
    ("buffers", "still_named"),
    [
        ("float32", []),
        (torch.float32, []),
        pytest.param({"*.weights", "mean"}, [], id="a set"),  # its text is in another order in each process
        (["running_*"], ["mean", "inner.weights"]),
        (("inner",), ["mean"]),
        ("weights", ["mean"]),
        ("*", []),
        ((), ["mean", "inner.weights"]),
        ("bfloat16", ["mean", "norm.running_mean", "norm.running_var", "inner.weights"]),
    ],
    ids=str,
)
def test_the_ways_out(buffers: Any, still_named: list[str]) -> None:
    model, plain = Tables(), Tables()
    messages = convert(HalfPrecision("bf16-true", buffers=buffers), model)
    assert [name for message in messages for name in named(message)] == still_named
    for name, buffer in model.named_buffers():
        lost = name in still_named
        assert torch.equal(buffer.to(dict(plain.named_buffers())[name].dtype), plain.get_buffer(name)) != (
            lost and "running" not in name
        )
        if name in ("mean", "norm.running_mean", "norm.running_var", "inner.weights"):
            assert buffer.dtype is (BF16 if lost else F32)


@pytest.mark.parametrize(
    ("buffers", "message"),
    [
        ({"*.weigths"}, "the pattern '*.weigths' matches no buffer of this model; did you mean \"inner.weights\"?"),
        ("mean2", "the pattern 'mean2' matches no buffer of this model; did you mean \"mean\"?"),
        ({"weight"}, "the pattern 'weight' matches no buffer of this model"),
        ({""}, "bad name pattern ''"),
        (3, "HalfPrecision(buffers=3): expected a float dtype, or name patterns of buffers"),
        (torch.int8, "unknown dtype torch.int8"),
    ],
)
def test_buffers_that_are_not_there_are_refused(buffers: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        HalfPrecision("bf16-true", buffers=buffers).convert_module(Tables())
    assert str(error.value).startswith(message)


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 2, 1))


@pytest.mark.parametrize("buffers", ["float32", None], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_batch_norm_with_float32_statistics_trains(mode: str, buffers: Any) -> None:
    precision, model, exact = HalfPrecision(mode, buffers=buffers), make_net(), make_net().double()
    assert convert(precision, model) == []
    assert {tensor.dtype for tensor in model[1].parameters()} == {F32} and model[0].weight.dtype is MODES[mode]
    kept = ["1"] if buffers else ["1.weight", "1.bias", "1.running_mean", "1.running_var"]
    reason = "torch's batch norm wants weight and" if buffers else "running statistics"
    assert [item.name for item in precision.report.skipped] == kept
    assert precision.report.skipped[0].detail.startswith(f"kept in float32: {reason}")
    means: list[Tensor] = []
    model[1].register_forward_hook(lambda norm, args, output: means.append(args[0].double().mean((0, 2)).detach()))
    data = torch.randn(20, 16, 2, 12, generator=torch.Generator().manual_seed(1)) * 3 + 5
    losses, expected = [], []
    for net, seen in ((model, losses), (exact, expected)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for x in data:
            output = call(precision, net, x) if net is model else net(x.double())
            loss = (output - x.to(output.dtype)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
    assert losses == pytest.approx(expected, rel=0.02) and losses[-1] < losses[0] / 2
    average = torch.zeros(8, dtype=F64)
    for mean in means:
        average += 0.1 * (mean - average)
    assert torch.allclose(model[1].running_mean.double(), average, rtol=1e-5, atol=1e-6)  # float32's digits, not half's
    model.eval()
    assert call(precision, model, data[0]).dtype is F32


def test_running_statistics_in_half_stand_still_as_the_warning_says() -> None:
    def update(buffers: Any) -> float:
        precision, norm = HalfPrecision("bf16-true", buffers=buffers), nn.BatchNorm1d(1, momentum=0.01)
        convert(precision, norm)
        for _ in range(500):
            call(precision, norm, torch.tensor([[99.0], [101.0]]))
        return norm.running_mean.item()

    assert update("float32") == pytest.approx(100 * (1 - 0.99**500), rel=1e-4)
    assert update(None) == update("float32")
    assert update("bfloat16") < 80


def test_pure_half_loses_small_updates_that_float32_keeps() -> None:
    layer = HalfPrecision("bf16-true").convert_module(nn.Linear(1, 1, bias=False))
    layer.weight.data.fill_(1.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    for _ in range(100):
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
    assert layer.weight.item() == 1.0  # 0.9 in exact arithmetic
