"""Models of transformers: they generate, train, come from a file and go back to floats, in the modes of their use."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from precision_bnb import MODES, BitsandbytesPrecision, Int8TrainingLinear, QuantizedLinear, dequantize
from precision_core import Fabric

transformers = pytest.importorskip("transformers")


def llama() -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "vocab_size": 50}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
        return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
def test_it_generates_as_the_dequantised_model_does(mode: str, tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", precision=BitsandbytesPrecision(mode, torch.float32))
    fabric.save_module(tmp_path / "model.safetensors", llama())
    with fabric.init_module():
        model = transformers.LlamaForCausalLM(llama().config).eval()
    fabric.load_module(tmp_path / "model.safetensors", model)
    fabric.setup(model)
    assert sum(isinstance(layer, QuantizedLinear) for layer in model.modules()) == 14
    assert type(model.lm_head) is torch.nn.Linear
    plain = copy.deepcopy(model)
    dequantize(plain)
    ids = torch.tensor([[1, 5, 9, 2]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert generated.shape == (1, 12)
    with torch.no_grad():
        mine, exact = model(generated).logits, plain(generated).logits
    assert (mine - exact).norm() < (0.05 if mode == "int8" else 1e-4) * exact.norm()
    if mode == "nf4-dq":
        assert torch.equal(generated, plain.generate(ids, attention_mask=torch.ones_like(ids), **options))


def t5() -> Any:
    sizes = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 2, "vocab_size": 100}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0)
        return transformers.T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_t5_casts_to_the_dtype_of_a_weight(mode: str, storage: str) -> None:
    """transformers says which layers' weights must stay floats: `_keep_in_fp32_modules`."""
    config = replace(MODES[mode], bnb_4bit_quant_storage=getattr(torch, storage))
    floats, ids = t5(), torch.tensor([[5, 9, 2, 77, 31]])
    plugin = BitsandbytesPrecision(config, torch.float32, ignore_modules={"lm_head"})
    model = plugin.convert_module(copy.deepcopy(floats))
    layer = model.encoder.block[0].layer[1].DenseReluDense
    assert type(layer.wo) is torch.nn.Linear and isinstance(layer.wi, QuantizedLinear)
    with torch.no_grad():
        mine, exact = (each(input_ids=ids, labels=ids).logits.flatten() for each in (model, floats))
    assert torch.cosine_similarity(mine, exact, 0) > {"nf4": 0.98, "int8": 0.999}[mode]


def gpt2() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=100, n_positions=32)
        return transformers.GPT2LMHeadModel(config).eval()


def test_a_dequantised_gpt2_fits_the_original() -> None:
    model, plain, ids = gpt2(), gpt2(), torch.tensor([[5, 9, 2, 77, 31]])
    plugin = BitsandbytesPrecision("nf4", torch.float32)
    plugin.convert_module(model)
    with torch.no_grad():
        expected = model(ids).logits
        square = model.transformer.h[0].attn.c_proj.dequantize()
        plain.load_state_dict(dequantize(model).state_dict())
        assert torch.allclose(plain(ids).logits, expected, atol=1e-6)
    assert torch.equal(plain.transformer.h[0].attn.c_proj.weight, square.t())


def test_gpt2_trains_in_int8() -> None:
    model, plain, ids = gpt2(), gpt2(), torch.tensor([[5, 9, 2, 77, 31]])
    BitsandbytesPrecision("int8-training", torch.float32).convert_module(model)
    assert sum(isinstance(layer, Int8TrainingLinear) for layer in model.modules()) == 4
    model(input_ids=ids, labels=ids).loss.backward()
    plain(input_ids=ids, labels=ids).loss.backward()
    mine, exact = (each.transformer.h[0].mlp.c_fc.weight.grad for each in (model, plain))
    assert mine.shape == exact.shape and (mine - exact).norm() < 0.05 * exact.norm()
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_far_positions_are_as_near_ones() -> None:
    """Rotary frequencies in bfloat16 would turn far positions by other angles."""
    plugin = BitsandbytesPrecision("nf4", torch.bfloat16)
    model = plugin.convert_module(llama())
    rotary = model.model.rotary_emb
    cosine, _ = rotary(torch.zeros(1, dtype=torch.float32), torch.tensor([[1900]]))
    exact, _ = llama().model.rotary_emb(torch.zeros(1, dtype=torch.float32), torch.tensor([[1900]]))
    assert torch.equal(cosine, exact)
