"""A bfloat16 checkpoint trains in float32, writes, and its tuned weights are one that transformers reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed here")

ALPHABET = [chr(code) for code in range(32, 127)]


def test_it_learns_and_writes(example: Callable[..., Any], tmp_path: Path) -> None:
    result = example("finetune_transformers", "--tiny", "--out", str(tmp_path / "model.safetensors"))
    assert result["dtype"] is torch.float32
    assert result["after"] < 0.65 * result["before"]
    assert result["text"].startswith("An assignment statement")
    assert len(result["text"]) > len("An assignment statement")


@pytest.mark.full
def test_a_model_in_a_folder_is_tuned_and_read_again(example: Callable[..., Any], tmp_path: Path) -> None:
    """The command without --tiny, on a folder as the hub's are."""
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({letter: index for index, letter in enumerate(ALPHABET)}, unk_token=" ")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=" ", unk_token=" ").save_pretrained(
        tmp_path
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=len(ALPHABET), **sizes)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).dtype is torch.bfloat16  # what meets upcast
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    options = ("--model", str(tmp_path), "--text", str(text), "--accelerator", "cpu", "--length", "32")
    weights = tmp_path / "model.safetensors"
    result = example("finetune_transformers", *options, "--steps", "10", "--rate", "1e-2", "--out", str(weights))
    assert result["after"] < 0.8 * result["before"]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.tensor([transformers.AutoTokenizer.from_pretrained(tmp_path).encode(text.read_text())[:32]])
    with torch.no_grad():
        assert again(input_ids=ids, labels=ids).loss.item() < 0.8 * result["before"]
