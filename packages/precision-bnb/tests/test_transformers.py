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


# ---------------------------------------------------------------- models that look at a layer's weight themselves

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100}
ATTENTION = {"intermediate_size": 128, "num_attention_heads": 4}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
WAVES = {
    "conv_dim": (32, 32),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "hidden_size": 64,
    "num_hidden_layers": 2,
}
NARROW = {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32}
JAMBA = {
    "attn_layer_offset": 1,
    "attn_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 2,
    "num_key_value_heads": 4,
}
SPARSE = {"num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}

READERS: dict[str, tuple[str, str, dict[str, Any], str]] = {  # class, config's class, its values, a layer that is read
    "mamba": ("MambaModel", "MambaConfig", SIZES, "layers.0.mixer.dt_proj"),
    "jamba": ("JambaModel", "JambaConfig", SIZES | ATTENTION | JAMBA, "layers.0.mamba.dt_proj"),
    "rwkv": ("RwkvModel", "RwkvConfig", SIZES | {"rescale_every": 1}, "blocks.1.attention.output"),
    "wavlm": ("WavLMModel", "WavLMConfig", WAVES | ATTENTION, "encoder.layers.0.attention.q_proj"),
    "mobilebert": (
        "MobileBertForMaskedLM",
        "MobileBertConfig",
        SIZES | ATTENTION | NARROW,
        "cls.predictions.dense",
    ),
    "switch": (
        "SwitchTransformersModel",
        "SwitchTransformersConfig",
        T5 | SPARSE,
        "encoder.block.1.layer.1.mlp.experts.expert_0.wo",
    ),
    "longt5": ("LongT5Model", "LongT5Config", T5 | {"local_radius": 8}, "encoder.block.0.layer.1.DenseReluDense.wo"),
    "falcon": ("FalconModel", "FalconConfig", SIZES | {"num_attention_heads": 4}, ""),
}


def built(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    kind, config, values, _ = READERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, kind)(getattr(transformers, config)(**values)).eval()
    ids = torch.arange(3, 19).view(2, 8)
    if name == "wavlm":
        return model, {"input_values": torch.linspace(0, 40, 400).sin().view(1, -1)}
    return model, {"input_ids": ids} | ({"decoder_input_ids": ids[:, :5]} if "d_ff" in READERS[name][2] else {})


@pytest.mark.parametrize("evaluated", [False, pytest.param(True, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", READERS)
def test_a_model_that_reads_weights_is_the_dequantised_one(name: str, evaluated: bool) -> None:
    model, inputs = built(name)
    with torch.no_grad():
        if evaluated:  # RWKV rescales weights in its first evaluation, and back in training
            model(**inputs)
        plugin = BitsandbytesPrecision("nf4", torch.float32)
        plugin.convert_module(model)
        plain = dequantize(copy.deepcopy(model))
        # WavLM in training differs from its own copy: not all that it draws is torch's.
        for training in (False,) if name == "wavlm" else (False, True, False):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                mine = model.train(training)(**inputs)[0]
                torch.manual_seed(1)
                exact = plain.train(training)(**inputs)[0]
            assert mine.isfinite().all() and torch.allclose(mine, exact, rtol=1e-4, atol=1e-5)
    layer = READERS[name][3]
    if layer:
        assert type(model.get_submodule(layer)) is torch.nn.Linear
        assert dict(plugin.report.skipped)[layer].startswith("its weight is read by ")
    assert sum(isinstance(each, QuantizedLinear) for each in model.modules()) >= 2
