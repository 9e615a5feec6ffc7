"""Exceptions on embeddings, norms and first layers of transformers' models: what comes after takes what they give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from precision_core import Fabric

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 32, "tie_word_embeddings": False}
SMALL = {"vocab_size": 64, "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {**SMALL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}

# class, config, embeddings, norms, first layer
MODELS: dict[str, tuple[str, dict[str, Any], str, str, str]] = {
    "Llama": (
        "LlamaForCausalLM",
        {**SIZES, "num_key_value_heads": 2},
        "embed_tokens",
        "*.input_layernorm",
        "model.layers.0",
    ),
    "GPT-2": ("GPT2LMHeadModel", GPT2, "transformer.wte", "*.ln_1", "transformer.h.0"),
    "T5": ("T5ForConditionalGeneration", {**SMALL, **T5}, "*.relative_attention_bias", "*.layer_norm", "*.block.0"),
    "BERT": ("BertForMaskedLM", SIZES, "bert.embeddings", "*.LayerNorm", "bert.encoder.layer.0"),
}
IDS = torch.arange(3, 19).view(2, 8)


def logits(name: str, mode: str, attention: str) -> tuple[Tensor, dict[str, torch.dtype]]:
    """Returns the logits, after a backward that gave every parameter a finite gradient of its own dtype."""
    kind, sizes = MODELS[name][:2]
    torch.manual_seed(0)
    config = getattr(transformers, kind).config_class(**sizes, attn_implementation=attention)
    model = getattr(transformers, kind)(config).eval()
    fabric = Fabric(accelerator="cpu", precision=mode)
    fabric.setup(model)
    mask = torch.ones_like(IDS)
    mask[1, 5:] = 0
    out = model(input_ids=IDS, attention_mask=mask, labels=IDS)
    fabric.backward(out.loss)
    trained = {key: param.grad for key, param in model.named_parameters() if param.grad is not None}
    assert trained and all(bool(grad.isfinite().all()) for grad in trained.values())
    return out.logits.detach().double(), {key: param.dtype for key, param in model.named_parameters()}


# slow_start: who comes first imports transformers' models
TIERS = {("Llama", "sdpa", 2): pytest.mark.slow_start, ("T5", "eager", 3): pytest.mark.slow_start}

CASES = [
    pytest.param(name, mode, attention, place, marks=TIERS.get((name, attention, place), pytest.mark.full))
    for name in MODELS
    for mode in ("bf16-true", "16-true")
    for attention in ("sdpa", "eager")
    for place in (2, 3, 4)
    if (name, attention) != ("T5", "sdpa")
]


@pytest.mark.filterwarnings("ignore:.*casts buffers to", "ignore:.*`loss_type=None`")
@pytest.mark.parametrize(("name", "mode", "attention", "place"), CASES)
def test_layers_after_an_exception_cast_what_they_are_given(name: str, mode: str, attention: str, place: int) -> None:
    pattern = MODELS[name][place]
    right, _ = logits(name, "64-true", attention)
    plain, _ = logits(name, mode, attention)
    mine, dtypes = logits(name, f"{mode}; {pattern}: 32-true", attention)
    assert (mine - right).abs().max() <= 1.5 * (plain - right).abs().max() + 1e-6  # no worse than without
    stem = pattern.strip("*").strip(".")
    covered = {dtype for key, dtype in dtypes.items() if f".{stem}." in f".{key}"}
    assert covered == {torch.float32}
    half = torch.bfloat16 if mode == "bf16-true" else torch.float16
    assert half in dtypes.values()
