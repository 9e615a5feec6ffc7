"""Models of transformers, from their configs: tied weights, RoPE, ModelOutput; sharded as on one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from precision_core import Fabric
from precision_core.testing import curve_distance, loss_bound, mean_curve, run_in_ranks
from precision_fsdp import FSDPStrategy

transformers = pytest.importorskip("transformers")

VOCABULARY, LENGTH, ROWS = 32, 8, 12


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def t5() -> Any:
    """One table for encoder, decoder and head."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def bert() -> Any:
    """The head's weight is the embedding's, and its bias stands under two names."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def curve(make: Any, mode: str, ranks: int, steps: int) -> tuple[list[float], dict[str, Any]]:
    torch.manual_seed(0)
    model = make()
    strategy: Any = FSDPStrategy(activation_checkpointing=True) if ranks > 1 else "single_device"
    keys = list(model.state_dict())
    fabric = Fabric(accelerator="cpu", strategy=strategy, precision=mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9)
    fabric.setup(model, optimizer)
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    mine = ids.chunk(ranks)[fabric.global_rank]
    losses = []
    for _ in range(steps):
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


def check(make: Any, groups: str, mode: str, steps: int) -> None:
    alone, expected = curve(make, mode, 1, steps)
    results = run_in_ranks(2, curve, make, mode, 2, steps)
    # Their norms and losses compute in float32 whatever the mode: no curve of theirs is exact to float64.
    bound = loss_bound("32-true" if mode == "64-true" else mode, steps)
    assert curve_distance(mean_curve([losses for losses, _ in results]), alone) <= bound
    assert alone[-1] < alone[0]
    for _, facts in results:
        assert facts["output"] == expected["output"] and facts["logits"] is expected["logits"]
        assert facts["keys"] and facts["tied"]
        assert f"{groups}, the rest in the root" in facts["report"]


@pytest.mark.filterwarnings("ignore:.*casts buffers to:UserWarning")
@pytest.mark.parametrize(
    ("make", "mode", "steps"),
    [
        *((gpt2, mode, 20) for mode in ("64-true", "32-true", "16-true", "16-mixed")),
        *((llama, mode, 20) for mode in ("bf16-true", "bf16-mixed")),
        *(
            pytest.param(make, mode, steps, marks=pytest.mark.full)
            for make, mode, steps in (
                *((gpt2, mode, 100) for mode in ("32-true", "bf16-mixed")),
                *((llama, mode, 100) for mode in ("32-true", "bf16-mixed")),
                (gpt2, "bf16-true", 20),
                *((llama, mode, 20) for mode in ("64-true", "16-true", "16-mixed")),
            )
        ),
    ],
)
def test_they_train_as_on_one_device(make: Any, mode: str, steps: int) -> None:
    check(make, f"3 groups, 2 of {'GPT2Block' if make is gpt2 else 'LlamaDecoderLayer'}", mode, steps)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")  # nothing adds to it
@pytest.mark.parametrize("mode", ["bf16-mixed", pytest.param("32-true", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("make", "groups"), [(t5, "5 groups, 4 of T5Block"), (bert, "3 groups, 2 of BertLayer")], ids=["t5", "bert"]
)
def test_weights_that_stand_in_several_places_stay_one(make: Any, groups: str, mode: str) -> None:
    check(make, groups, mode, steps=10)
