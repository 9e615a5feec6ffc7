"""The parameter: bitsandbytes' to whoever asks for its codes, one tensor of packed bytes to all others."""

from __future__ import annotations

import copy
import io
from typing import Any

import bitsandbytes
import bitsandbytes.functional as functional
import pytest
import torch
from bitsandbytes.utils import replace_linear
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from precision_bnb import MODES, BitsandbytesPrecision, QuantizedEmbedding, bitsandbytes_state_dict
from precision_bnb.params import is_packed
from precision_core.testing import run_in_ranks

PACKED = [mode for mode in MODES if mode != "int8-training"]
BF16 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"}


def linear(columns: int = 128, rows: int = 64) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(columns, rows)


def ours(mode: Any, layer: nn.Linear | None = None) -> Any:
    model = nn.Sequential(layer or linear())
    return BitsandbytesPrecision(mode, torch.float32).convert_module(model)[0]


def theirs(mode: str, dtype: torch.dtype = torch.float32) -> Any:
    layer = linear().to(dtype)
    if mode == "int8":
        new: Any = bitsandbytes.nn.Linear8bitLt(128, 64, has_fp16_weights=False, threshold=6.0)
    else:
        new = bitsandbytes.nn.Linear4bit(128, 64, quant_type=mode[:3], compress_statistics="dq" in mode)
        new.to(dtype)
    new.load_state_dict(layer.state_dict())
    return new.to("cpu")


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


@pytest.mark.parametrize("mode", PACKED)
def test_what_bitsandbytes_is_handed_is_its_own(mode: str) -> None:
    mine, other = ours(mode), theirs(mode)
    weight = mine.weight
    assert type(weight).__name__ == type(other.weight).__name__ and isinstance(weight, type(other.weight))
    assert torch.equal(weight.data, other.weight.data) and weight.numel() == other.weight.numel()
    if mode == "int8":
        assert torch.equal(weight.CB, other.weight.CB) and torch.equal(mine.state.SCB, other.weight.SCB)
        assert (mine.state.threshold, mine.state.has_fp16_weights, mine.index) == (6.0, False, None)
        for given in (weight, weight.data):
            expected = functional.int8_vectorwise_dequant(other.weight.data, other.weight.SCB)
            assert torch.equal(functional.int8_vectorwise_dequant(given, mine.state.SCB), expected)
        return
    assert weight.quant_state == other.weight.quant_state == mine.quant_state
    expected = functional.dequantize_4bit(other.weight.data, other.weight.quant_state)
    x = torch.randn(3, 128)
    for given in (weight, weight.data):
        assert torch.equal(functional.dequantize_4bit(given, weight.quant_state), expected)
    for given in (weight, weight.t(), weight.data):
        assert torch.equal(bitsandbytes.matmul_4bit(x, given, quant_state=weight.quant_state), x @ expected.t())
    assert torch.equal(weight.absmax, other.weight.absmax) and torch.equal(weight.quant_map, other.weight.quant_map)
    if "dq" in mode:
        assert torch.equal(weight.nested_absmax, other.weight.nested_absmax) and weight.nested_blocksize == 256


@pytest.mark.parametrize("mode", [*PACKED, BF16], ids=str)
def test_all_others_see_packed_bytes(mode: Any) -> None:
    layer = ours(mode)
    weight, layout = layer.weight, layer.layout
    assert weight.shape == layout.shape and weight.nbytes == layout.nbytes == weight.untyped_storage().nbytes()
    assert type(weight.detach()) is Tensor and type(layer.state_dict()["weight"]) is Tensor
    assert dict(layer.named_parameters())["weight"] is weight and not weight.requires_grad
    buffer = io.BytesIO()
    torch.save(layer.state_dict(keep_vars=True), buffer)
    buffer.seek(0)
    assert torch.equal(bits(torch.load(buffer, weights_only=True)["weight"]), bits(weight))
    for other in (copy.deepcopy(weight), copy.copy(weight)):
        assert type(other) is type(weight) and torch.equal(bits(other), bits(weight))
        assert other.data_ptr() != weight.data_ptr() and other.numel() == weight.numel()


def test_the_dtype_that_was_quantised_is_remembered() -> None:
    """transformers loads models in the dtype of their file; bitsandbytes dequantises to that."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        mine, other = ours("nf4", linear().to(dtype)), theirs("nf4", dtype)
        assert mine.weight.quant_state.dtype is other.weight.quant_state.dtype is dtype
        assert copy.deepcopy(mine).weight.quant_state.dtype is dtype
        taken = BitsandbytesPrecision("nf4", torch.float32).convert_module(nn.Sequential(other))[0]
        assert taken.weight.quant_state.dtype is dtype


@pytest.mark.parametrize("mode", [*PACKED, BF16], ids=str)
def test_data_is_written_and_set_as_codes_or_as_packed_bytes(mode: Any) -> None:
    layer, kept = ours(mode), copy.deepcopy(ours(mode).weight)
    layer.weight.data = layer.weight.data.clone().to("cpu")  # as code that moves parameters by hand does
    assert torch.equal(bits(layer.weight), bits(kept)) and is_packed(layer.weight)
    layer.weight.data = kept.detach().clone()
    assert torch.equal(bits(layer.weight), bits(kept))
    layer.weight.data.zero_()
    assert not bits(layer.weight.data).any() and torch.equal(bits(layer.weight)[-32:], bits(kept)[-32:])
    assert layer.weight.to("cpu") is layer.weight and layer.weight.to(torch.float16) is layer.weight
    assert layer.weight.to("meta").is_meta


@pytest.mark.parametrize("mode", PACKED)
def test_a_weight_of_bitsandbytes_is_packed_when_it_is_set(mode: str) -> None:
    layer, other = ours(mode, nn.Linear(128, 64)), theirs(mode)
    before = copy.deepcopy(layer.weight)
    layer.weight = other.weight
    assert is_packed(layer.weight) and torch.equal(bits(layer.weight), bits(ours(mode).weight))
    assert not torch.equal(bits(layer.weight), bits(before))
    x = torch.randn(3, 128)
    layer.bias = nn.Parameter(linear().bias.detach())
    assert torch.equal(layer(x), ours(mode)(x))
    wrong = theirs("int8" if mode != "int8" else "nf4").weight
    with pytest.raises((ValueError, RuntimeError)):
        layer.weight = wrong
        layer(x)


def test_a_weight_in_another_format_is_refused() -> None:
    layer = ours("nf4")
    with pytest.raises(ValueError, match=r"bitsandbytes' .'fp4', 64, False"):
        layer.weight = theirs("fp4").weight
    assert torch.equal(bits(layer.weight), bits(ours("nf4").weight))


def test_embeddings_have_such_a_weight() -> None:
    model = nn.Sequential(nn.Embedding(50, 64))
    BitsandbytesPrecision("nf4", torch.float32, embeddings=True).convert_module(model)
    assert isinstance(model[0], QuantizedEmbedding) and 2 * model[0].weight.numel() == 50 * 64
    state = bitsandbytes_state_dict(model)
    assert torch.equal(state["0.weight"], model[0].dequantize())  # bitsandbytes cannot save theirs


# ---------------------------------------------------------------- the state dict


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", PACKED)
def test_the_state_dict_of_bitsandbytes_there_and_back(mode: str, dtype: torch.dtype) -> None:
    mine, other = ours(mode, linear().to(dtype)), theirs(mode, dtype)
    found, wanted = bitsandbytes_state_dict(mine), other.state_dict()
    wanted["bias"] = mine.bias.detach()  # which is float32 here
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) and value.dtype is wanted[name].dtype for name, value in found.items())
    again = ours(mode, nn.Linear(128, 64))
    again.load_state_dict(found, strict=True)
    assert torch.equal(bits(again.weight), bits(mine.weight))
    assert bitsandbytes_state_dict(mine, found).keys() == found.keys()  # what is in that form stays
    assert list(mine.state_dict()) == ["weight", "bias"]


# ---------------------------------------------------------------- others that replace layers


def test_replace_linear_of_bitsandbytes_replaces_theirs_and_ours_alike() -> None:
    """It asks a layer for its sizes alone: nothing can be refused there."""
    for layer in (ours("nf4"), theirs("nf4")):
        model = nn.Sequential(layer)
        replace_linear(model, bitsandbytes.nn.Linear8bitLt)
        assert type(model[0]) is bitsandbytes.nn.Linear8bitLt


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_torchao_refuses_ours_as_it_refuses_theirs(mode: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    for layer in (ours(mode), theirs(mode)):
        with pytest.raises((RuntimeError, AssertionError, ValueError, NotImplementedError)):
            quantization.quantize_(nn.Sequential(layer), quantization.Int8WeightOnlyConfig())
        with torch.no_grad():
            layer(torch.randn(2, 128))


# ---------------------------------------------------------------- sharded


def after_sharding() -> dict[str, Any]:
    model = nn.Sequential(linear())
    BitsandbytesPrecision("nf4", torch.float32).convert_module(model)
    expected, packed = model(torch.eye(128)).detach(), bits(model[0].weight)
    fully_shard(model)
    layer: Any = model[0]
    state = bitsandbytes_state_dict(model)
    return {
        "isinstance": isinstance(layer, bitsandbytes.nn.Linear4bit),
        "sharded": isinstance(layer.weight, DTensor) and torch.equal(bits(layer.weight.full_tensor()), packed),
        "no parameter of bitsandbytes": not isinstance(layer.weight, bitsandbytes.nn.Params4bit),
        "no state": layer.quant_state is None,
        "exported": "0.weight.absmax" in state and type(state["0.weight"]) is Tensor,
        "forward": torch.equal(model(torch.eye(128)), expected),
    }


def test_what_holds_after_fully_shard() -> None:
    for found in run_in_ranks(2, after_sharding):
        assert found == dict.fromkeys(found, True)
