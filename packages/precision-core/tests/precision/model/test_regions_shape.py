"""Exceptions and the shape of the model: containers, shared and tied modules, devices, and what cannot hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precision_core import HalfPrecision, MixedPrecision, Precision

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


class Recorder(nn.Module):
    """Stands for any module: notes what it takes, computes with, creates and gives."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.seen: dict[str, torch.dtype] = {}

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        self.seen = {"takes": x.dtype, "creates": torch.zeros(1).dtype, "gives": y.dtype}
        return y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.norm(self.embedding(ids)))


def make(mode: str, model: Any) -> tuple[Precision, Any, Callable[..., Any]]:
    """Returns plugin, converted model, and the model's forward under the plugin's hooks."""
    plugin = MixedPrecision(mode, device="cpu") if "mixed" in mode.split(";")[0] else HalfPrecision(mode)
    plugin.convert_module(model)

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = plugin.convert_input((args, kwargs))
        with plugin.forward_context():
            output = model(*args, **kwargs)
        return plugin.convert_output(output)

    return plugin, model, forward


@pytest.mark.parametrize("container", ["list", "dict"])
@pytest.mark.parametrize("base", ["bf16-mixed", "bf16-true"])
def test_an_exception_may_name_a_container_that_has_no_forward(base: str, container: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = {"a": Recorder(nn.Linear(2, 2)), "b": Recorder(nn.Linear(2, 2))}
            self.blocks: Any = nn.ModuleDict(layers) if container == "dict" else nn.ModuleList(layers.values())

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.blocks.values() if container == "dict" else self.blocks:
                x = layer(x)
            return x

    _, model, forward = make(f"{base}; blocks: 32-true", Model())
    forward(torch.ones(1, 2))
    for layer in model.blocks.values() if container == "dict" else model.blocks:
        assert set(layer.seen.values()) == {F32} and layer.layer.weight.dtype is F32


@pytest.mark.parametrize(
    "layer", [nn.Linear(3, 3), nn.LayerNorm(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3, affine=False), nn.GRUCell(3, 3)]
)
@pytest.mark.filterwarnings("ignore:bf16-true casts buffers:UserWarning")
def test_layers_after_a_region_take_its_wider_output(layer: nn.Module) -> None:
    _, model, forward = make("bf16-true; 0: 32-true", nn.Sequential(Recorder(nn.Linear(3, 3)), Recorder(layer)))
    forward(torch.ones(4, 3))
    assert model[0].seen["gives"] is F32 and model[1].seen == {"takes": F32, "creates": BF16, "gives": BF16}


def test_keyword_arguments_nested_inputs_and_integers_of_a_region() -> None:
    class Layer(nn.Linear):
        def forward(self, batch: dict[str, Any], *, scale: Tensor) -> tuple[Tensor, Any]:  # type: ignore[override]
            self.seen = (batch["x"][0].dtype, batch["ids"].dtype, scale.dtype)
            return super().forward(batch["x"][0] * scale), {"ids": batch["ids"], "n": 3}

    plugin, model, _ = make("bf16-true; 0: 32-true", nn.Sequential(Layer(2, 2)))
    layer, ids = model[0], torch.arange(2)
    args = plugin.convert_input({"x": [torch.ones(1, 2)], "ids": ids})
    output, rest = layer(args, scale=torch.ones(1, dtype=BF16))
    assert layer.seen == (F32, torch.int64, F32)
    assert output.dtype is F32 and rest["ids"] is ids and rest["n"] == 3


def test_a_mixed_region_in_a_mixed_model_keeps_its_inputs() -> None:
    _, model, forward = make(
        "bf16-mixed; 0: params=float32,compute=float16,scale=false", nn.Sequential(Recorder(Add()))
    )
    x = torch.tensor([1001.1, 0.1], dtype=F64)
    assert torch.equal(forward(x), x + 1) and model[0].seen["takes"] is F64


class Add(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def test_without_a_strategy_autocast_follows_the_parameters_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    _, model, forward = make("bf16-true; 1: bf16-mixed", model)
    with torch.no_grad():
        for param in model.to_empty(device="cpu").parameters():
            param.fill_(0.3)
    hidden = F.linear(torch.ones(1, 2).to(BF16), model[0].weight, model[0].bias)
    expected = F.linear(hidden, model[1].weight.to(BF16), model[1].bias.to(BF16)).float()
    assert torch.equal(forward(torch.ones(1, 2)), expected)


def tied() -> nn.Module:
    model = Net()
    model.lm_head.weight = nn.Parameter(torch.empty(11, 8))
    model.embedding.weight = model.lm_head.weight
    return model


def shared() -> nn.Module:
    layer = nn.Linear(8, 8)
    return nn.ModuleDict({"a": layer, "b": layer})


REFUSED = [
    ("bf16-true; *.nrm: 32-true", Net, "the pattern '*.nrm' matches no module of this model; did you mean"),
    ("bf16-mixed; lm_head2: 32-true", Net, 'matches no module of this model; did you mean "lm_head"?'),
    ("bf16-true; lm_head: 32-true", tied, "embedding.weight and lm_head.weight are one tied parameter, but the policy"),
    ("bf16-true; lm_head: 32-true", tied, "name both modules in the exception, or neither"),
    ("bf16-mixed; b: 32-true", shared, "a and b are one shared module, but the policy runs it as bf16-mixed and as 32"),
    (
        "bf16-mixed; out_proj: 32-true",
        lambda: nn.Sequential(nn.MultiheadAttention(8, 2)),
        "the exception for 0.out_proj would do nothing: torch's MultiheadAttention uses its weights without calling",
    ),
]


@pytest.mark.parametrize(("mode", "model", "message"), REFUSED)
def test_exceptions_that_cannot_hold_are_refused_before_anything_changes(mode: str, model: Any, message: str) -> None:
    module = model()
    with pytest.raises(ValueError) as error:
        make(mode, module)
    assert message in str(error.value)
    assert {param.dtype for param in module.parameters()} == {F32}
    assert not any("forward" in child.__dict__ for child in module.modules())


def test_ties_and_shared_modules_under_one_policy_stay() -> None:
    _, model, _ = make("bf16-true; lm_head: 32-true; embedding: 32-true", tied())
    assert model.lm_head.weight is model.embedding.weight and model.lm_head.weight.dtype is F32
    _, both, _ = make("bf16-mixed; a: 32-true; b: 32-true", shared())
    assert both["a"] is both["b"] and both["a"](torch.ones(1, 8)).dtype is F32
    assert both["a"].forward.__wrapped__ is nn.Linear.forward  # overridden once


def test_a_shared_layer_runs_under_the_policy_of_each_caller() -> None:
    layer = Recorder(nn.Linear(2, 2))
    model = nn.Sequential(nn.Sequential(layer), nn.Sequential(layer))
    _, model, forward = make("bf16-mixed; 1: 32-true", model)
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(layer.seen["gives"]))
    forward(torch.ones(1, 2))
    assert seen == [BF16, F32]


def test_the_whole_model_may_be_the_exception() -> None:
    _, model, forward = make("bf16-true; *: 32-true", nn.Sequential(Recorder(nn.Linear(2, 2))))
    forward(torch.ones(1, 2))
    assert set(model[0].seen.values()) == {F32}
