"""Layers of bitsandbytes' own: taken over where they are what was asked for, refused before anything changes."""

from __future__ import annotations

import gc
import re
import weakref
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt, LinearNF4
from torch import Tensor, nn

from precision_bnb import BitsandbytesPrecision, Int8TrainingLinear, QuantizedLinear
from precision_bnb.adopt import format_of_bnb_layer


def model_with(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), layer, nn.Linear(64, 8))


def filled(layer: nn.Linear, like: nn.Linear) -> nn.Linear:
    layer.load_state_dict(like.state_dict())
    return layer


@pytest.mark.parametrize("kind", [Linear8bitLt, LinearNF4], ids=lambda kind: kind.__name__)
def test_float_layers_of_theirs_train_as_torchs_do(kind: type[nn.Linear]) -> None:
    like = nn.Linear(64, 64)
    theirs, torchs = model_with(filled(kind(64, 64), like)), model_with(like)
    theirs[1].weight.requires_grad_()
    theirs[0].load_state_dict(torchs[0].state_dict())
    theirs[2].load_state_dict(torchs[2].state_dict())
    x, grads = torch.randn(4, 64), []
    for model in (theirs, torchs):
        BitsandbytesPrecision("int8-training", torch.float32).convert_module(model)
        assert type(model[1]) is Int8TrainingLinear and type(model[1].weight) is nn.Parameter
        model(x).square().sum().backward()
        grads.append(model[1].weight.grad)
    assert grads[0].count_nonzero() and torch.equal(*grads)


@pytest.mark.parametrize("kind", ["nf4", "fp4-dq", "int8"])
@pytest.mark.parametrize("mode", ["nf4", "fp4", "nf4-dq", "int8", "int8-training"])
def test_what_is_quantised_otherwise_is_refused_and_nothing_changed(kind: str, mode: str) -> None:
    theirs: nn.Linear
    if kind == "int8":
        theirs = Linear8bitLt(64, 64, has_fp16_weights=False)
    else:
        theirs = Linear4bit(64, 64, quant_type=kind[:3], compress_statistics="dq" in kind)
    model = model_with(theirs).to("cpu")  # quantises
    types = [type(layer) for layer in model]
    if kind == mode:
        BitsandbytesPrecision(mode).convert_module(model)
        assert isinstance(model[1], QuantizedLinear)
        return
    match = rf'1 is quantised by bitsandbytes in {kind}.*: pass precision="{re.escape(kind)}"'
    with pytest.raises(ValueError, match=match):
        BitsandbytesPrecision(mode).convert_module(model)
    assert [type(layer) for layer in model] == types


@pytest.mark.parametrize("evaluated", [False, True])
def test_their_codes_and_scales_are_let_go(evaluated: bool) -> None:
    model: Any = model_with(Linear8bitLt(64, 64, has_fp16_weights=False)).to("cpu")
    if evaluated:
        model(torch.randn(2, 64))
    held = [model[1].weight, *(value for value in vars(model[1].state).values() if isinstance(value, Tensor))]
    references = [weakref.ref(value) for value in held]
    del held
    BitsandbytesPrecision("int8").convert_module(model)
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)
    assert not {"state", "index"} & set(vars(model[1]))


def test_a_raw_layer_beside_ours_is_taken_over() -> None:
    plugin = BitsandbytesPrecision("nf4", torch.float32)
    model = plugin.convert_module(nn.Sequential(nn.Linear(64, 64)))
    raw, x = LinearNF4(64, 64, compress_statistics=False).to("cpu"), torch.randn(3, 64)
    raw.support_avx512bf16_for_cpu = False
    expected = raw(x)
    model.append(raw).append(nn.Linear(64, 8)).append(LinearNF4(64, 64))  # the last is not quantised yet
    kept = model[0].weight
    plugin.convert_module(model)
    assert [isinstance(layer, QuantizedLinear) for layer in model] == [True, True, False, True]
    assert model[0].weight is kept and torch.equal(model[1](x), expected)
    assert [item.name for item in plugin.report.converted] == ["1", "3"]
    model.append(Linear4bit(64, 64, quant_type="fp4").to("cpu"))
    with pytest.raises(ValueError, match="4 is quantised by bitsandbytes in fp4-dq"):
        plugin.convert_module(model)
    BitsandbytesPrecision("nf4", torch.float32, ignore_modules={"4"}).convert_module(model)
    assert type(model[4]) is Linear4bit


def test_a_layer_whose_weight_alone_knows_how_it_is_packed_is_taken_over() -> None:
    """bitsandbytes puts the state on the layer too, in its first forward; a weight that is replaced brings its own."""
    torch.manual_seed(0)
    layer = LinearNF4(64, 64, compute_dtype=torch.float32)
    layer.weight = type(layer.weight)(torch.randn(64, 64), requires_grad=False, quant_type="nf4").to("cpu")
    layer.quant_state = None
    assert layer.weight.quant_state is not None
    found = format_of_bnb_layer(layer)
    assert found is not None and found.quant_type == "nf4"
    layer.weight.quant_state = None
    assert format_of_bnb_layer(layer) is None
