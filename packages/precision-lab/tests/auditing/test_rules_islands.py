"""Float32 islands: products, promotions and casts where half was to be used; what is meant to be float32 is left."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from planted import AUTOCAST, audited, found, train
from torch import Tensor, nn

from precision_lab.auditing.report import Report

HALF = torch.bfloat16
X = torch.randn(8, 16)


def codes(report: Report) -> list[tuple[str, str]]:
    return [(each.code, each.level) for each in report.findings if each.level != "info"]


# ------------------------------------------------------------------ products


class Linear(torch.autograd.Function):
    """Without custom_fwd: autocast casts in forward, backward multiplies in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        gradient = gradient.float()
        return gradient @ weight.t(), x.float().t() @ gradient


class Decorated(torch.autograd.Function):
    """As the finding says."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=HALF)
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return gradient @ weight.t(), x.t() @ gradient


class Own(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def test_a_function_whose_backward_multiplies_in_float32() -> None:
    model = nn.Sequential(nn.Linear(16, 16), Own(Linear.apply), nn.Linear(16, 4))
    finding = found(audited(lambda: train(model, X, context=AUTOCAST)), "float32-island")
    assert finding.level == "warning" and finding.module == "1" and "in backward in float32" in finding.what
    assert finding.line is not None and finding.line.text == "return x @ weight"
    assert "custom_fwd" in finding.remedy.torch


def test_a_decorated_function_is_right() -> None:
    model = nn.Sequential(nn.Linear(16, 16), Own(Decorated.apply), nn.Linear(16, 4))
    assert audited(lambda: train(model, X, context=AUTOCAST)).findings == []


def test_a_product_that_autocast_does_not_know() -> None:
    model = nn.Sequential(Own(lambda x, weight: torch.stack([torch.mv(weight, row) for row in x])), nn.Linear(16, 4))
    finding = found(audited(lambda: train(model, X, context=AUTOCAST)), "float32-island")
    assert finding.module == "0" and finding.level == "warning" and "(mv)" in finding.what


class HeadInFloat32(nn.Module):
    def __init__(self, size: int = 64) -> None:
        super().__init__()
        self.body = nn.Linear(16, 16).to(HALF)
        self.head = nn.Linear(16, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).float())


def test_a_layer_with_float32_input_in_a_half_model() -> None:
    model = nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 16)).to(HALF).append(HeadInFloat32())
    finding = found(audited(lambda: train(model, X.to(HALF))), "float32-island")
    assert finding.module == "3.head" and finding.level == "warning"
    assert finding.line is not None and finding.line.text == "return self.head(self.body(x).float())"


def test_a_small_router_in_float32_is_info() -> None:
    model = nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 16)).to(HALF).append(HeadInFloat32(4))
    report = audited(lambda: train(model, X.to(HALF)))
    assert found(report, "float32-island").level == "info"


class Disabled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        with torch.autocast("cpu", enabled=False):
            return self.head(x.float())


def test_autocast_that_was_disabled_on_purpose_is_info() -> None:
    model = nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 16), Disabled())
    assert codes(audited(lambda: train(model, X, context=AUTOCAST))) == []


class Adapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(16, 16).to(HALF).requires_grad_(False)
        self.down, self.up = nn.Linear(16, 4), nn.Linear(4, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x.float())).to(x.dtype)


def test_float32_adapters_of_a_frozen_half_model_are_right() -> None:
    assert codes(audited(lambda: train(nn.Sequential(Adapter(), nn.GELU(), Adapter()), X.to(HALF)))) == []


# ------------------------------------------------------------------ promotions


class Scaled(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.body = nn.Linear(16, 16)
        self.register_buffer("scale", torch.rand(16))
        self.mask = torch.rand(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if self.how == "buffer":
            return x * self.scale
        if self.how == "attribute":
            return x + self.mask
        if self.how == "made":
            return x * torch.linspace(0, 1, 16)
        return x * self.scale.to(x.dtype)


@pytest.mark.parametrize("how", ["buffer", "attribute", "made"])
def test_a_float32_constant_that_promotes_what_follows(how: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16), Scaled(how), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 4))
    finding = found(audited(lambda: train(model, X, context=AUTOCAST)), "promoted-to-float32")
    assert finding.level == "warning" and finding.module == "1" and "in 2 other modules too (2, 3)" in finding.what
    assert finding.line is not None and finding.line.text.startswith("return x ")


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def test_a_parameter_that_a_half_model_left_in_float32() -> None:
    body = nn.Sequential(nn.Linear(16, 16), nn.GELU()).to(HALF)
    report = audited(lambda: train(nn.Sequential(body, Gain(), nn.GELU(), nn.Dropout(0.1)), X.to(HALF)))
    finding = found(report, "promoted-to-float32")
    assert finding.level == "warning" and finding.module == "1" and "constant, input or parameter" in finding.what
    assert (
        audited(lambda: train(nn.Sequential(nn.Linear(16, 16), Gain(), nn.GELU()), X, context=AUTOCAST)).findings == []
    )


def test_a_constant_of_the_activations_dtype_is_right() -> None:
    model = nn.Sequential(nn.Linear(16, 16), Scaled("cast"), nn.GELU(), nn.Linear(16, 4))
    assert audited(lambda: train(model, X, context=AUTOCAST)).findings == []


class Mask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.register_buffer("mask", torch.full((8, 8), -1e4).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.softmax(q @ k.transpose(-1, -2) / math.sqrt(16) + self.mask, -1) @ v


def test_a_mask_before_a_softmax_is_no_more_than_info() -> None:
    report = audited(lambda: train(nn.Sequential(Mask(), nn.Linear(16, 4)), torch.randn(2, 8, 16), context=AUTOCAST))
    finding = found(report, "promoted-to-float32")
    assert finding.level == "info" and finding.module == "0" and "self.mask" in str(finding.line and finding.line.text)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.gamma = nn.Linear(16, 16), nn.Linear(16, 16), nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.gelu(self.one(x))
        return x + self.gamma * F.gelu(self.two(x))


def test_a_residual_stream_in_float32_is_right() -> None:
    assert audited(lambda: train(nn.Sequential(Residual(), nn.Linear(16, 4)), X, context=AUTOCAST)).findings == []


# ------------------------------------------------------------------ casts


class Upcast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        return self.two(x.float())


def test_a_cast_to_float32_that_autocast_undoes() -> None:
    model = nn.Sequential(Upcast(), nn.Linear(16, 4))
    finding = found(audited(lambda: train(model, X, context=AUTOCAST)), "float32-cast-undone")
    assert finding.level == "warning" and finding.module == "0"
    assert finding.line is not None and finding.line.text == "return self.two(x.float())"


class Wide(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def test_a_cast_to_float32_that_other_modules_compute_in() -> None:
    model = nn.Sequential(nn.Linear(16, 16), Wide(), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 4))
    finding = found(audited(lambda: train(model, X, context=AUTOCAST)), "promoted-to-float32")
    assert finding.level == "warning" and finding.module == "1" and "a cast makes half activations" in finding.what
    assert finding.line is not None and finding.line.text == "return x.float()"


class Norm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Careful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(16, 16), Norm()

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.norm(x.float()).to(x.dtype)


def test_a_cast_for_a_norm_and_one_at_the_end_are_right() -> None:
    model = nn.Sequential(nn.Linear(16, 16), Careful(), nn.Linear(16, 4), Wide())
    assert audited(lambda: train(model, X, context=AUTOCAST)).findings == []
