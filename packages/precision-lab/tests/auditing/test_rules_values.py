"""Tables, statistics, integers and complex values that a half dtype cannot hold."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from planted import AUTOCAST, audited, found, train
from torch import Tensor, nn

from precision_core import Fabric
from precision_lab.auditing.report import Report

HALF = torch.bfloat16
X = torch.randn(2, 12, 16)


def codes(report: Report) -> list[str]:
    return [each.code for each in report.findings if each.level != "info"]


def half(model: nn.Module, x: Tensor = X) -> Report:
    def run() -> None:
        model.bfloat16()
        train(model, x.to(HALF), optimizer=torch.optim.SGD(model.parameters(), lr=1.0))

    return audited(run)


# ------------------------------------------------------------------ tables


class Rotary(nn.Module):
    """Turns pairs of features by angles from a table, or computed of frequencies."""

    def __init__(self, table: str, persistent: bool = True) -> None:
        super().__init__()
        self.table = table
        self.qkv = nn.Linear(16, 16)
        frequencies = 1 / 10000 ** (torch.arange(0, 16, 2) / 16)
        angles = torch.outer(torch.arange(12.0), frequencies)
        if table == "inv_freq":
            self.register_buffer("inv_freq", frequencies, persistent=persistent)
        elif table == "sinusoidal":
            both = torch.zeros(12, 16)
            both[:, 0::2], both[:, 1::2] = angles.sin(), angles.cos()
            self.register_buffer("pe", both[None], persistent=persistent)
        else:
            self.register_buffer("cos", angles.cos(), persistent=persistent)
            self.register_buffer("sin", angles.sin(), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        x = self.qkv(x)
        if self.table == "sinusoidal":
            return x + self.pe.to(x.dtype)
        if self.table == "inv_freq":
            angles = torch.outer(torch.arange(12.0), self.inv_freq.float())
            cos, sin = angles.cos(), angles.sin()
        else:
            cos, sin = self.cos, self.sin
        a, b = x.chunk(2, -1)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


@pytest.mark.parametrize(
    ("table", "name", "what"),
    [
        ("inv_freq", "0.inv_freq", "rotary frequencies"),
        ("cos and sin", "0.cos, 0.sin", "sines and cosines"),
        ("sinusoidal", "0.pe", "sines and cosines"),
    ],
)
def test_a_table_that_a_cast_of_the_model_rounds(table: str, name: str, what: str) -> None:
    finding = found(half(nn.Sequential(Rotary(table), nn.Linear(16, 4))), "rounded-positions")
    assert finding.level == "warning" and finding.module == "0" and name in finding.what and what in finding.what
    assert finding.line is not None and finding.line.text == "model.bfloat16()"


def test_frequencies_cast_back_to_float32_are_rounded_all_the_same() -> None:
    model = nn.Sequential(Rotary("inv_freq"), nn.Linear(16, 4)).half().bfloat16().float()
    finding = found(audited(lambda: train(model, X)), "rounded-positions")
    assert "float32, but were rounded to half before: 0.inv_freq" in finding.what


def test_a_table_that_is_no_buffer() -> None:
    model = nn.Sequential(Rotary("inv_freq"), nn.Linear(16, 4))
    model[0].angles = torch.arange(300).to(HALF)
    finding = found(audited(lambda: train(model, X)), "rounded-positions")
    assert "positions are stored in bfloat16: 0.angles" in finding.what


def test_angles_that_are_computed_in_half() -> None:
    class Angles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(16, 16)
            self.register_buffer("inv_freq", 1 / 10000 ** (torch.arange(0, 32, 2) / 32))

        def forward(self, x: Tensor) -> Tensor:
            angles = torch.arange(12.0)[:, None] @ self.inv_freq[None]
            return self.body(x) + angles.cos()

    report = audited(lambda: train(nn.Sequential(Angles(), nn.Linear(16, 4)), X, context=AUTOCAST))
    finding = found(report, "rounded-positions")
    assert finding.module == "0" and finding.line is not None and "angles.cos()" in finding.line.text
    assert "cos of angles up to 11 is computed of bfloat16" in finding.what


def sinusoidal(dtype: torch.dtype, of: torch.dtype, rows: int = 512) -> Tensor:
    positions, steps = torch.arange(rows, dtype=dtype)[:, None], torch.arange(0, 16, 2, dtype=dtype)
    angles = (positions * torch.exp(steps * (-math.log(10000.0) / 16))).to(of)
    return torch.stack([torch.sin(angles), torch.cos(angles)], -1).flatten(1)  # here


@pytest.mark.parametrize("of", [HALF, torch.float32], ids=["half", "cast back"])
@pytest.mark.parametrize("dtype", [HALF, torch.float16])
def test_a_table_that_is_computed_in_half_throughout(dtype: torch.dtype, of: torch.dtype) -> None:
    def run() -> None:
        model = nn.Sequential(Rotary("inv_freq"), nn.Linear(16, 4))
        model.register_buffer("pe", sinusoidal(dtype, dtype if of is HALF else of))
        train(model, X, context=AUTOCAST)

    found_here = [each for each in audited(run).findings if each.code == "rounded-positions" and each.line is not None]
    assert any(each.line.text.endswith("# here") and "angles up to 51" in each.what for each in found_here if each.line)


@pytest.mark.parametrize("wave", [lambda: torch.arange(0, 100, 0.25).sin(), lambda: torch.randn(64).to(HALF).sin()])
def test_waves_and_tables_of_a_loop_are_right(wave: Callable[[], Tensor]) -> None:
    def run() -> None:
        assert wave().isfinite().all() and sinusoidal(torch.float32, torch.float32).isfinite().all()
        train(nn.Linear(16, 4), X, context=AUTOCAST)

    assert codes(audited(run)) == []


@pytest.mark.parametrize("table", ["inv_freq", "cos and sin", "sinusoidal"])
def test_tables_in_float32_are_right(table: str) -> None:
    model = nn.Sequential(Rotary(table), nn.Linear(16, 4))
    assert codes(audited(lambda: train(model, X, context=AUTOCAST))) == []


@pytest.mark.parametrize("table", ["inv_freq", "cos and sin", "sinusoidal"])
@pytest.mark.parametrize("precision", ["bf16-true", "params=bfloat16,buffers=float32"])
def test_what_our_fabric_keeps_in_float32_is_right(table: str, precision: str) -> None:
    def run() -> None:
        fabric = Fabric(accelerator="cpu", precision=precision)
        model = nn.Sequential(Rotary(table, persistent=precision != "bf16-true"), nn.Linear(16, 4))
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=1.0))
        fabric.backward(model(X).pow(2).mean())
        optimizer.step()

    report = audited(run)
    assert "rounded-positions" not in [each.code for each in report.findings]


def test_other_buffers_in_half_are_right() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    model[0].register_buffer("noise", torch.randn(12, 16))
    model[0].register_buffer("mask", torch.ones(12, 12).tril())
    model[0].register_buffer("schedule", torch.linspace(1, 0.5, 50))
    assert "rounded-positions" not in codes(half(model))


# ------------------------------------------------------------------ running statistics


def convolutions() -> nn.Sequential:
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(body, nn.Flatten(), nn.Linear(4 * 36, 4))


IMAGES = torch.randn(4, 1, 8, 8)


def test_statistics_of_a_batch_norm_in_half() -> None:
    finding = found(half(convolutions(), IMAGES), "half-statistics")
    assert finding.level == "warning" and finding.module == "0.1"
    assert "0.1.running_mean, 0.1.running_var" in finding.what


def test_a_batch_norm_that_is_kept_is_right() -> None:
    model = convolutions()
    model.bfloat16()
    model[0][1].float()
    report = audited(lambda: train(model, IMAGES.to(HALF)))
    assert "half-statistics" not in codes(report)
    assert audited(lambda: train(convolutions(), IMAGES, context=AUTOCAST)).findings == []


# ------------------------------------------------------------------ integers


class Timed(nn.Module):
    """Adds features of times, which are whole numbers."""

    def __init__(self, features: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.features, self.body, self.head = features, nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        return self.head(self.body(x) + self.features(times))


TIMES = torch.arange(200, 1000, 70)[:, None]


@pytest.mark.parametrize(
    "features",
    [
        lambda times: times.to(HALF) / 1000,
        lambda times: times.bfloat16() / 1000,
        lambda times: times.float().to(HALF) / 1000,
        lambda times: times * torch.tensor([1e-3], dtype=HALF),
        lambda times: torch.empty(12, 1, dtype=HALF).copy_(times) / 1000,
    ],
)
def test_times_that_are_cast_to_half(features: Callable[[Tensor], Tensor]) -> None:
    report = audited(lambda: train(Timed(features), X, TIMES, context=AUTOCAST))
    finding = found(report, "rounded-integers")
    assert finding.level == "warning" and "up to 970 become bfloat16" in finding.what
    assert finding.line is not None and "lambda times" in finding.line.text


def test_positions_that_are_made_in_half() -> None:
    positions = Timed(lambda times: torch.arange(1000, dtype=HALF)[::90, None] / 1000)
    finding = found(audited(lambda: train(positions, X, TIMES, context=AUTOCAST)), "rounded-integers")
    assert "up to 1,000 become bfloat16" in finding.what and finding.line is not None


def test_ids_that_a_wrapper_casts_before_the_model() -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(3000, 16), nn.Linear(16, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids.long()))

    ids = torch.randint(3000, (64,))

    def run() -> None:
        model = Embedded()
        train(model, ids.to(HALF))

    finding = found(audited(run), "rounded-integers")
    assert finding.line is not None and finding.line.text == "train(model, ids.to(HALF))"


@pytest.mark.parametrize(
    "features",
    [
        lambda times: torch.sin(times.float() / 1000).to(HALF),
        lambda times: (times // 100).to(HALF),
        lambda times: torch.where(times > 500, -1e9, 0.0).to(HALF) * 0,
        lambda times: torch.full((12, 1), torch.finfo(torch.float32).min).to(HALF) * 0,
    ],
)
def test_features_of_times_small_integers_and_masks_are_right(features: Callable[[Tensor], Tensor]) -> None:
    assert codes(audited(lambda: train(Timed(features), X, TIMES, context=AUTOCAST))) == []


# ------------------------------------------------------------------ complex


class Fourier(nn.Module):
    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.how, self.head = how, nn.Linear(16, 4)
        self.weight = nn.Parameter(torch.randn(9, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.how(torch.fft.rfft(x) * self.weight))


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_an_imaginary_part_that_a_cast_drops() -> None:
    def dropped(z: Tensor) -> Tensor:
        return torch.cat([z.to(torch.float32), z.abs()], -1)[..., :16]

    finding = found(audited(lambda: train(Fourier(dropped), X)), "complex-dropped")
    assert finding.level == "error" and finding.line is not None and "z.to(torch.float32)" in finding.line.text


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_a_model_whose_complex_weights_are_cast() -> None:
    def run() -> None:
        model = Fourier(torch.fft.irfft)
        model.to(torch.float32)
        train(model, X)

    finding = found(audited(run), "complex-dropped")
    assert "a model's complex parameters" in finding.what
    assert finding.line is not None and finding.line.text == "model.to(torch.float32)"


@pytest.mark.parametrize(
    "how",
    [
        torch.fft.irfft,
        lambda z: torch.view_as_real(z).flatten(-2)[..., :16],
        lambda z: torch.cat([z.real, z.imag], -1)[..., :16],
    ],
)
def test_complex_numbers_whose_parts_are_taken_are_right(how: Callable[[Tensor], Tensor]) -> None:
    assert audited(lambda: train(Fourier(how), X)).findings == []
