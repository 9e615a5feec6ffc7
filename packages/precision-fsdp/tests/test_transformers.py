"""Llama and GPT-2 of transformers, from their configs: tied head, RoPE, ModelOutput; sharded as on one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from precision_core import Fabric
from precision_core.testing import curve_distance, run_in_ranks
from precision_core.testing.problem import mean_curve
from precision_fsdp import FSDPStrategy

transformers = pytest.importorskip("transformers")

VOCABULARY, LENGTH, ROWS = 32, 8, 12


def make(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def curve(kind: str, mode: str, strategy: Any, ranks: int) -> tuple[list[float], dict[str, Any]]:
    model = make(kind)
    keys = list(model.state_dict())
    fabric = Fabric(accelerator="cpu", strategy=strategy, precision=mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    fabric.setup(model, optimizer)
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    mine = ids.chunk(ranks)[fabric.global_rank]
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        output = model(input_ids=mine, labels=mine)
        fabric.backward(output.loss)
        optimizer.step()
        losses.append(output.loss.item())
    facts = {
        "output": type(output).__name__,
        "logits": output.logits.dtype,
        "keys": list(model.state_dict()) == keys,
        "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "report": str(fabric.precision_plugin.report),
    }
    return losses, facts


BOUNDS = {"32-true": 1e-5, "bf16-mixed": 2e-3}


@pytest.mark.parametrize("mode", BOUNDS)
@pytest.mark.parametrize(("kind", "block"), [("gpt2", "GPT2Block"), ("llama", "LlamaDecoderLayer")])
def test_they_train_as_on_one_device(kind: str, block: str, mode: str) -> None:
    alone, expected = curve(kind, mode, "single_device", 1)
    results = run_in_ranks(2, lambda: curve(kind, mode, FSDPStrategy(activation_checkpointing=True), 2))
    assert curve_distance(mean_curve([losses for losses, _ in results]), alone) <= BOUNDS[mode]
    assert alone[-1] < 0.95 * alone[0]
    for _, facts in results:
        assert facts["output"] == expected["output"] and facts["logits"] is torch.float32
        assert facts["keys"] and facts["tied"]
        assert f"3 groups, 2 of {block}, the rest in the root" in facts["report"]
