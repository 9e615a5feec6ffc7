"""Norms, softmaxes and losses in half, and float64 that leaked in."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from planted import AUTOCAST, audited, found, mlp, train
from torch import Tensor, nn

from precision_core import Fabric
from precision_lab.auditing.report import Report

HALF = torch.bfloat16
X = torch.randn(8, 16)
SGD = torch.optim.SGD


class Layer(nn.Module):
    """A function between two layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.before, self.after = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.function(self.before(x)))


def half(function: Callable[[Tensor], Tensor], dtype: torch.dtype = HALF) -> Report:
    model = Layer(function).to(dtype)
    return audited(lambda: train(model, X.to(dtype), optimizer=SGD(model.parameters(), lr=1.0)))


def codes(report: Report) -> list[str]:
    return [each.code for each in report.findings if each.level != "info"]


# ------------------------------------------------------------------ norms and softmaxes


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def rms_of_squares(x: Tensor) -> Tensor:
    squares = x * x
    return x / (squares.sum(-1, keepdim=True) / 16 + 1e-6).sqrt()


def layer_norm(x: Tensor) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / torch.sqrt(variance + 1e-5)


def by_deviation(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)


def by_length(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-6)


def normalised(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


@pytest.mark.parametrize("norm", [rms, rms_of_squares, layer_norm, by_deviation, by_length, normalised])
def test_a_norm_by_hand_in_half_is_found(norm: Callable[[Tensor], Tensor]) -> None:
    finding = found(half(norm), "half-norm")
    assert finding.level == "warning" and finding.line is not None and finding.line.function == norm.__name__


def test_under_autocast_too() -> None:
    report = audited(lambda: train(Layer(rms), X, context=AUTOCAST))
    assert found(report, "half-norm").level == "warning"


def test_a_norm_that_autocast_leaves_in_half_is_worth_knowing_alone() -> None:
    report = audited(lambda: train(Layer(normalised), X, context=AUTOCAST))
    assert found(report, "half-norm").level == "info" and codes(report) == []


def test_a_mode_asked_for_by_name_makes_it_info() -> None:
    def run() -> None:
        fabric = Fabric(accelerator="cpu", precision="bf16-true")
        model = Layer(rms)
        model, optimizer = fabric.setup(model, SGD(model.parameters(), lr=1.0))
        fabric.backward(model(X).pow(2).mean())
        optimizer.step()

    report = audited(run)
    assert found(report, "half-norm").level == "info" and codes(report) == []


def rms_in_float32(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def normalised_wide(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1).to(x.dtype)


def pooled(x: Tensor) -> Tensor:
    return x.square() + x.mean(-1, keepdim=True) + x.abs().sqrt()


@pytest.mark.parametrize(
    "function",
    [rms_in_float32, pooled, lambda x: F.rms_norm(x, (16,)), lambda x: F.layer_norm(x, (16,)), normalised_wide],
)
def test_norms_in_float32_and_what_is_none_are_right(function: Callable[[Tensor], Tensor]) -> None:
    assert "half-norm" not in codes(half(function))


def softmax(x: Tensor) -> Tensor:
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def log_softmax(x: Tensor) -> Tensor:
    return x - x.exp().sum(-1, keepdim=True).log()


@pytest.mark.parametrize("function", [softmax, log_softmax])
def test_a_softmax_by_hand_in_half_is_found(function: Callable[[Tensor], Tensor]) -> None:
    finding = found(half(function), "half-softmax")
    assert finding.level == "warning" and finding.line is not None and finding.line.function == function.__name__


def divergence(x: Tensor) -> Tensor:
    return x * torch.exp(0.5 * x) + (1 + x - x.pow(2) - x.exp()).sum(-1, keepdim=True)


@pytest.mark.parametrize(
    "function", [divergence, lambda x: torch.softmax(x, -1), lambda x: softmax(x.float()).to(HALF)]
)
def test_other_exponentials_are_right(function: Callable[[Tensor], Tensor]) -> None:
    assert "half-softmax" not in codes(half(function))


# ------------------------------------------------------------------ losses

TARGETS = torch.randint(2000, (8,))


def classify(model: nn.Module, loss: Callable[[Tensor], Tensor], x: Tensor) -> Report:
    return audited(lambda: train(model, x, loss=loss, optimizer=SGD(model.parameters(), lr=1.0)))


@pytest.mark.parametrize(
    "loss",
    [
        lambda logits: F.cross_entropy(logits, TARGETS),
        lambda logits: F.nll_loss(logits.log_softmax(-1), TARGETS),
        lambda logits: -(torch.log(torch.softmax(logits, -1) + 1e-6)[range(8), TARGETS]).mean(),
    ],
)
def test_a_loss_over_many_classes_in_half(loss: Callable[[Tensor], Tensor]) -> None:
    finding = found(classify(mlp(out=2000).to(HALF), loss, X.to(HALF)), "half-loss")
    assert finding.level == "warning" and "over 2,000 classes" in finding.what
    assert finding.line is not None and "logits" in finding.line.text


def test_a_loss_that_is_one_large_sum_in_half() -> None:
    x = torch.randn(300, 16).to(HALF)
    report = classify(mlp(out=256).to(HALF), lambda output: output.pow(2).sum() * 1e-4, x)
    finding = found(report, "half-loss")
    assert "sum of 76,800 elements" in finding.what


def test_losses_in_float32_and_over_few_classes_are_right() -> None:
    few = torch.randint(4, (8,))
    report = classify(mlp(out=2000).to(HALF), lambda logits: F.cross_entropy(logits.float(), TARGETS), X.to(HALF))
    assert "half-loss" not in codes(report)
    report = classify(mlp().to(HALF), lambda logits: F.cross_entropy(logits, few), X.to(HALF))
    assert "half-loss" not in codes(report)


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(out=2000)

    def forward(self, x: Tensor) -> Tensor:
        return F.cross_entropy(self.body(x), TARGETS)


def test_autocast_computes_losses_in_float32() -> None:
    assert audited(lambda: train(WithLoss(), X, context=AUTOCAST, loss=lambda loss: loss)).findings == []


# ------------------------------------------------------------------ float64

WEIGHTS = np.random.default_rng(0).random(8)


def test_weights_of_a_loss_that_numpy_made() -> None:
    def loss(output: Tensor) -> Tensor:
        return (output.pow(2).mean(-1) * torch.tensor(WEIGHTS)).mean()

    finding = found(audited(lambda: train(mlp(), X, loss=loss)), "float64-leak")
    assert finding.level == "warning" and finding.line is not None and "torch.tensor(WEIGHTS)" in finding.line.text


def test_a_buffer_that_numpy_made_inside_of_a_module() -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
            self.register_buffer("scale", torch.from_numpy(np.ones(16)))

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.body(x) * self.scale).float())

    finding = found(audited(lambda: train(nn.Sequential(Normalised()), X)), "float64-leak")
    assert finding.module == "0" and finding.line is not None and "self.scale" in finding.line.text


def test_a_parameter_that_numpy_made() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(16, 16)
            self.bias = nn.Parameter(torch.from_numpy(np.zeros(16)))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + self.bias

    report = audited(lambda: train(nn.Sequential(Biased()), X))
    findings = [each for each in report.findings if each.code == "float64-leak"]
    assert "1 of 3 parameters are float64: 0.bias" in findings[0].what and findings[0].module == "0"


def test_a_module_that_casts_to_float64() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return (x.double() @ self.weight.double()).float()

    finding = found(audited(lambda: train(nn.Sequential(Wide(), nn.Linear(16, 4)), X)), "float64-leak")
    assert finding.level == "warning" and finding.module == "0" and "89% of the results" in finding.what


def test_a_loss_that_is_cast_to_float64_is_info() -> None:
    finding = found(audited(lambda: train(mlp(), X, loss=lambda output: output.mean().double())), "float64-leak")
    assert finding.level == "info" and finding.what == "the loss is float64"


def test_training_in_float64_on_purpose_is_right() -> None:
    assert audited(lambda: train(mlp().double(), X.double(), loss=lambda out: out.pow(2).mean())).findings == []


def test_a_metric_in_float64_is_right() -> None:
    def loss(output: Tensor) -> Tensor:
        (output.detach().double() * torch.tensor(WEIGHTS)[:, None]).mean()
        return output.pow(2).mean()

    assert audited(lambda: train(mlp(), X, loss=loss)).findings == []
