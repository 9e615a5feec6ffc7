"""Subclasses of nn.Linear: quantised where they compute what it does, else left alone with what they add."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precision_bnb import MODES, BitsandbytesPrecision, Int8TrainingLinear, QuantizedLinear
from precision_bnb.convert import quantize
from precision_bnb.lookalikes import differs_from_linear
from precision_core import Fabric


class ByHand(nn.Linear):
    """As Falcon's."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = x @ self.weight.T
        return hidden if self.bias is None else hidden + self.bias


class Renamed(ByHand):
    def __init__(self, width: int, depth: int = 3) -> None:
        super().__init__(width, width)
        self.depth = depth

    def extra_repr(self) -> str:
        return f"{self.depth} deep"


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Dropping(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


class Casting(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).double()


class Asking(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("not today")


class WithAPart(nn.Linear):
    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows)
        self.lora_A = nn.Parameter(torch.zeros(4, columns))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (x @ self.lora_A.t()).sum()


class WithAMethod(nn.Linear):
    def transposed(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Model(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer, self.out = kind(64, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x))


@pytest.mark.parametrize("kind", [ByHand, Renamed, type("Bare", (nn.Linear,), {})], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("mode", ["nf4", "int8", "int8-training"])
def test_one_that_computes_what_linear_does_is_quantised_as_that(mode: str, kind: Any) -> None:
    random = torch.get_rng_state()
    mine, plain = Model(kind), Model(nn.Linear)
    plugin, x = BitsandbytesPrecision(mode, torch.float32), torch.randn(3, 64)
    torch.set_rng_state(random)
    for model in (mine, plain):
        plugin.convert_module(model).eval()
    assert torch.equal(torch.get_rng_state(), random)
    assert isinstance(mine.layer, Int8TrainingLinear if mode == "int8-training" else QuantizedLinear)
    assert torch.equal(mine(x), plain(x)) and mine.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Scaled, "which computes something else than x W^T + bias"),
        (Dropping, "which computes something else than x W^T + bias"),
        (Casting, "which computes something else than x W^T + bias"),
        (Asking, "whose forward could not be tried: RuntimeError: not today"),
        (WithAPart, "which holds lora_A as well"),
        (WithAMethod, "which has transposed of its own"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_one_that_differs_is_left_alone_and_says_in_what(kind: Any, why: str) -> None:
    plugin, model, x = BitsandbytesPrecision("nf4", torch.float32), Model(kind), torch.randn(3, 64)
    expected = model.layer(x) if kind is Scaled else None
    plugin.convert_module(model)
    assert type(model.layer) is kind and isinstance(model.out, QuantizedLinear)
    assert dict(plugin.report.skipped)["layer"] == f"a subclass of Linear: {kind.__name__}, {why}"
    assert expected is None or torch.equal(model.layer(x), expected)
    with pytest.raises(ValueError, match=r"no layer to quantise.*put nn.Linear in its place"):
        plugin.convert_module(nn.Sequential(kind(64, 64)))


def test_one_on_the_meta_device_is_tried_without_its_values() -> None:
    with torch.device("meta"):
        model = Model(ByHand)
    assert differs_from_linear(model.layer) is None
    surgery = quantize(model, MODES["nf4"], torch.float32)
    assert len(surgery.report.converted) == 2 and model.layer.weight.is_meta


def test_a_parametrised_one_is_refused_as_linear_is() -> None:
    model = Model(ByHand)
    nn.utils.parametrizations.weight_norm(model.layer)
    with pytest.raises(ValueError, match="layer: a parametrisation of weight"):
        Fabric(accelerator="cpu", precision="nf4").setup(model)


def test_one_that_trains_in_a_model_that_peft_froze_stays() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Model(nn.Linear), peft.LoraConfig(target_modules=["out"]))
    model.base_model.gate = ByHand(64, 64)
    BitsandbytesPrecision("nf4", torch.float32).convert_module(model)
    assert type(model.base_model.gate) is ByHand and model.base_model.gate.weight.requires_grad
