"""transformers' models in half modes: what each keeps in float32, and the very logits of transformers' own loading."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from precision_core import Fabric

transformers = pytest.importorskip("transformers")

LM: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
ATTENTION: dict[str, Any] = {**LM, "num_attention_heads": 4}
GROUPED: dict[str, Any] = {**ATTENTION, "num_key_value_heads": 2, "max_position_embeddings": 4096}
EXPERTS: dict[str, Any] = {**GROUPED, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
IMAGES: dict[str, Any] = {**ATTENTION, "image_size": 32, "patch_size": 8}
del IMAGES["vocab_size"]
SPEECH: dict[str, Any] = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
SPEECH |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 64}
DEEPSEEK = {"num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
DEEPSEEK |= {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
QFORMER = {"encoder_hidden_size": 32, "vocab_size": 64}

ROTARY = {"rotary_emb.inv_freq", "rotary_emb.original_inv_freq"}
ROUTER = {"mlp.gate.weight", "mlp.gate.e_score_correction_bias"}
NORM = {f"normalization.{key}" for key in ("weight", "bias", "running_mean", "running_var")}

# name -> class, config, what 16-true keeps (ends of names), whether bf16-true keeps it too
MODELS: dict[str, tuple[str, dict[str, Any], set[str], bool]] = {
    "T5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        {"DenseReluDense.wo.weight"},
        False,
    ),
    "Llama": ("LlamaForCausalLM", GROUPED, ROTARY, True),
    "Mistral": ("MistralForCausalLM", GROUPED, ROTARY, True),
    "Mixtral": ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 4}, ROTARY, True),
    "DeepSeek-V3": ("DeepseekV3ForCausalLM", EXPERTS | DEEPSEEK, ROTARY | ROUTER, True),
    "GLM4-MoE": (
        "Glm4MoeForCausalLM",
        {**EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1, "head_dim": 8},
        ROTARY | ROUTER,
        True,
    ),
    "Qwen2-MoE": (
        "Qwen2MoeForCausalLM",
        {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 32},
        ROTARY,
        True,
    ),
    "Lfm2-MoE": (
        "Lfm2MoeForCausalLM",
        {**EXPERTS, "num_experts": 4, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
        {"pos_emb.inv_freq", "pos_emb.original_inv_freq", "feed_forward.expert_bias"},
        True,
    ),
    "Gemma2": ("Gemma2ForCausalLM", {**GROUPED, "head_dim": 8}, ROTARY | {"embed_tokens.embed_scale"}, True),
    "GPT-NeoX": ("GPTNeoXForCausalLM", ATTENTION, ROTARY, True),
    "Falcon": (
        "FalconForCausalLM",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        ROTARY,
        True,
    ),
    "GPT-2": ("GPT2LMHeadModel", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}, set(), True),
    "Mamba": (
        "MambaForCausalLM",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        set(),
        True,
    ),
    "RWKV": (
        "RwkvForCausalLM",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64},
        {"attention.time_decay", "attention.time_first"},
        False,
    ),
    "BERT": ("BertForMaskedLM", ATTENTION, set(), True),
    "ViT": ("ViTForImageClassification", IMAGES, set(), True),
    "ResNet": (
        "ResNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"},
        NORM,
        True,
    ),
    "CLIP": ("CLIPModel", {"text_config": ATTENTION, "vision_config": IMAGES, "projection_dim": 16}, set(), True),
    "Whisper": (
        "WhisperForConditionalGeneration",
        {**SPEECH, "max_source_positions": 50, "num_mel_bins": 16, "pad_token_id": 0, "decoder_start_token_id": 1},
        set(),
        True,
    ),
    "BLIP-2": (
        "Blip2ForConditionalGeneration",
        {
            "vision_config": IMAGES,
            "qformer_config": {**ATTENTION, **QFORMER},
            "text_config": {
                "model_type": "opt",
                "vocab_size": 64,
                "hidden_size": 32,
                "ffn_dim": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "word_embed_proj_dim": 32,
                "max_position_embeddings": 128,
            },
            "num_query_tokens": 4,
            "image_token_index": 63,
        },
        {"query_tokens", "qformer.layernorm.weight", "attention.attention.query.weight", "output.LayerNorm.bias"},
        False,
    ),
}


def make(name: str) -> Any:
    kind = getattr(transformers, MODELS[name][0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(kind.config_class(**MODELS[name][1])).eval()


def batch(name: str, length: int = 16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (2, length), generator=generator)
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    images = torch.full((2, 4), 63)
    special: dict[str, dict[str, torch.Tensor]] = {
        "T5": {"input_ids": ids, "decoder_input_ids": ids[:, :8]},
        "ViT": {"pixel_values": pixels},
        "ResNet": {"pixel_values": pixels},
        "CLIP": {"input_ids": ids, "pixel_values": pixels},
        "BLIP-2": {"input_ids": torch.cat([images, ids], 1), "pixel_values": pixels},
        "Whisper": {"input_features": torch.randn(2, 16, 100, generator=generator), "decoder_input_ids": ids},
    }
    return special.get(name, {"input_ids": ids})


def logits(model: Any, inputs: dict[str, torch.Tensor], cast: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        output = model(**{key: cast(value) if value.is_floating_point() else value for key, value in inputs.items()})
    found: torch.Tensor = output.logits_per_image if hasattr(output, "logits_per_image") else output.logits
    return found.float()


FAST = (("T5", "16-true"), ("Llama", "16-true"))
CASES = [
    pytest.param(name, mode, id=f"{name}-{mode}", marks=[] if (name, mode) in FAST else pytest.mark.full)
    for name in MODELS
    for mode in ("16-true", "bf16-true")
]


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_it_keeps_what_transformers_keeps_and_computes_what_it_computes(name: str, mode: str, tmp_path: Path) -> None:
    dtype = {"16-true": torch.float16, "bf16-true": torch.bfloat16}[mode]
    length = 2048 if name == "Llama" else 16  # far positions, which rounded rotary frequencies would turn
    model, inputs = make(name), batch(name, length)
    for key, buffer in model.named_buffers():
        if key.endswith("_bias"):
            buffer.data = torch.linspace(-0.3, 0.3, buffer.numel())
    model.save_pretrained(tmp_path)
    theirs = logits(type(model).from_pretrained(tmp_path, dtype=dtype).eval(), inputs, lambda value: value.to(dtype))
    fabric = Fabric(accelerator="cpu", precision=mode)
    mine = logits(fabric.setup(model), inputs, lambda value: value)
    assert torch.equal(mine, theirs)
    _, _, ends, in_both = MODELS[name]
    kept = {re.sub(r"\.\d+\.", ".*.", item.name) for item in fabric.precision_plugin.report.skipped}
    wanted = ends if in_both or mode == "16-true" else set()
    assert all(any(item.endswith(end) for item in kept) for end in wanted) and bool(kept) is bool(wanted)
    if name != "BLIP-2":  # whose whole Q-Former stays
        assert all(any(item.endswith(end) for end in wanted) for item in kept)
