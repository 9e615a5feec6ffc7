"""Finetuning scripts as people write them for bitsandbytes' layers, run on those and on ours: what differs is `load`.

Ten steps on a tiny Llama, adapters saved, merged, the merged model saved and loaded again by transformers. Losses,
merged models and what they generate are the same, token by token. Versions: the row recipes-cpu of ci/matrix.toml.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from precision_bnb import BitsandbytesPrecision
from precision_core.testing import run_in_ranks

pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*erge lora module to .-bit linear may get different"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.utils.checkpoint. the use_reentrant parameter"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*no accelerator is found"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

STEPS, VOCABULARY = 10, 64
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
INT8 = {"load_in_8bit": True}
Load = Callable[[Path], Any]


def llama() -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            **sizes, num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0
        )
        return transformers.LlamaForCausalLM(config)


def sentences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    starts = torch.randint(3, VOCABULARY, (4 * STEPS,), generator=generator).tolist()
    return [[3 + (start + 5 * step) % (VOCABULARY - 3) for step in range(12)] for start in starts]


class Sentences(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return len(sentences())

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.tensor(sentences()[index])
        return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


# ---------------------------------------------------------------- what differs


def theirs(config: dict[str, Any]) -> Load:
    def load(folder: Path) -> Any:
        quantization_config = transformers.BitsAndBytesConfig(**config)
        return plain(transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization_config))

    return load


def ours(config: dict[str, Any]) -> Load:
    def load(folder: Path) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        return BitsandbytesPrecision(config, torch.float32).convert_module(model)

    return load


def plain(model: Any) -> Any:
    """Keeps bitsandbytes' layers from repacking themselves in an evaluation, which their training does not survive."""
    for layer in model.modules():
        if type(layer) is bitsandbytes.nn.Linear4bit:
            layer.support_avx512bf16_for_cpu = False
    return model


# ---------------------------------------------------------------- what is the same in all


def find_all_linear_names(model: nn.Module) -> list[str]:
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    names = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, kinds)}
    names.discard("lm_head")
    return sorted(names)


def lora(model: nn.Module) -> Any:
    names = find_all_linear_names(model)
    assert len(names) == 7
    return peft.LoraConfig(r=4, lora_alpha=16, target_modules=names, lora_dropout=0.0, task_type="CAUSAL_LM")


def generated(model: Any) -> list[int]:
    ids = torch.tensor([[1, 7, 12, 17]])
    mask = torch.ones_like(ids)
    result = plain(model).eval().generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False, use_cache=True)
    return result[0].tolist()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return plain(model).eval()(torch.tensor(sentences()[:4])).logits


def merged(model: Any, folder: Path) -> tuple[list[int], Tensor]:
    """Saves adapters, merges, saves, and loads again; returns what the merged model generates, and its logits."""
    model.save_pretrained(folder / "adapter")
    model = model.merge_and_unload()
    model.save_pretrained(folder / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "merged")
    tokens, values = generated(model), logits(model)
    assert generated(again) == tokens and torch.equal(logits(again), values)
    return tokens, values


Result = tuple[list[float], list[int], Tensor]


# ---------------------------------------------------------------- recipes


def with_trainer(load: Load, base: Path, folder: Path) -> Result:
    model = load(base)
    model.config.use_cache = False
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    assert model.is_gradient_checkpointing
    model = peft.get_peft_model(model, lora(model))
    model.print_trainable_parameters()
    arguments = transformers.TrainingArguments(
        folder / "out",
        per_device_train_batch_size=4,
        max_steps=STEPS,
        learning_rate=5e-3,
        logging_steps=1,
        save_steps=STEPS,
        optim="adamw_torch",
        report_to=[],
        use_cpu=True,
        seed=0,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=Sentences())
    trainer.train()
    trainer.save_model(folder / "trained")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, *merged(trainer.model, folder)


def with_accelerate(load: Load, base: Path, folder: Path) -> Result:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = peft.get_peft_model(load(base), peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=5e-3)
    loader = torch.utils.data.DataLoader(Sentences(), batch_size=2)  # type: ignore[var-annotated]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses, *merged(accelerator.unwrap_model(model), folder)


def with_sft(load: Load, base: Path, folder: Path) -> Result:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model = load(base)
    arguments = trl.SFTConfig(
        str(folder / "out"),
        per_device_train_batch_size=4,
        max_steps=STEPS,
        learning_rate=5e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=0,
        bf16=False,
        disable_tqdm=True,
        max_length=16,
    )
    trainer = trl.SFTTrainer(
        model,
        arguments,
        train_dataset=datasets.Dataset.from_list([{"input_ids": each} for each in sentences()]),
        processing_class=tokenizer(),
        peft_config=lora(model),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, *merged(trainer.model, folder)


def tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in range(3, VOCABULARY)}}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **names)


def hand_loop(model: Any) -> list[float]:
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=5e-3)
    batches, losses = torch.tensor(sentences()).split(4), []
    model.train()
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def merged_by_another_script(load: Load, base: Path, folder: Path) -> Result:
    """As axolotl does: training saves adapters alone; a second process loads both, merges, and saves."""
    model = peft.get_peft_model(load(base), peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    losses = hand_loop(model)
    model.save_pretrained(folder / "trained")
    again = peft.PeftModel.from_pretrained(load(base), folder / "trained")
    assert torch.equal(logits(again), logits(model))
    return losses, *merged(again, folder)


def in_8_bits(load: Load, base: Path, folder: Path) -> Result:
    model = peft.prepare_model_for_kbit_training(load(base), gradient_checkpointing_kwargs={"use_reentrant": False})
    model = peft.get_peft_model(model, lora(model))
    return hand_loop(model), *merged(model, folder)


RECIPES: dict[str, tuple[Callable[[Load, Path, Path], Result], dict[str, Any]]] = {
    "trainer": (with_trainer, NF4),
    "accelerate": (with_accelerate, NF4),
    "sft": (with_sft, NF4),
    "merged later": (merged_by_another_script, NF4),
    "8 bits": (in_8_bits, INT8),
}
FAST = ("trainer", "8 bits")


@pytest.mark.parametrize(
    "recipe", [name if name in FAST else pytest.param(name, marks=pytest.mark.full) for name in RECIPES]
)
def test_a_script_for_bitsandbytes_layers_runs_on_ours(recipe: str, tmp_path: Path) -> None:
    run, config = RECIPES[recipe]
    llama().save_pretrained(tmp_path / "base")
    results = []
    for name, load in (("ours", ours(config)), ("theirs", theirs(config))):
        torch.manual_seed(0)
        results.append(run(load, tmp_path / "base", tmp_path / name))
    (losses, tokens, values), (their_losses, their_tokens, their_values) = results
    assert losses == their_losses and losses[-1] < 0.97 * losses[0] and len(losses) >= STEPS
    assert tokens == their_tokens and torch.equal(values, their_values)


# ---------------------------------------------------------------- FSDP2

STORED = {**NF4, "bnb_4bit_quant_storage": "bfloat16"}


def sharded(base: Path, folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    """A QLoRA script for FSDP2 by hand: all parameters of a block sharded, one dtype of storage; returns adapters."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.manual_seed(0)
    model = peft.get_peft_model(
        ours(STORED)(base), peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    assert isinstance(layer.weight, DTensor) and isinstance(layer, bitsandbytes.nn.Linear4bit)
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=5e-3)
    batches, losses = torch.tensor(sentences()).split(4), []
    model.train()
    for batch in batches:
        mine = batch.chunk(dist.get_world_size())[dist.get_rank()]
        loss = model(input_ids=mine, labels=mine).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    named = {name: param for name, param in model.named_parameters() if "lora_" in name}
    return losses, {name: each.full_tensor().detach().clone() for name, each in named.items()}


@pytest.mark.full
def test_fsdp2_shards_and_merges_as_one_process_on_bitsandbytes_layers(tmp_path: Path) -> None:
    base = tmp_path / "base"
    llama().save_pretrained(base)
    (losses, adapters), _ = run_in_ranks(2, sharded, base, tmp_path)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    reference = peft.get_peft_model(theirs(STORED)(base), config)
    expected = hand_loop(reference)
    assert max(abs(mine - other) for mine, other in zip(losses, expected, strict=True)) < 1e-4 * expected[0]
    torch.manual_seed(0)
    model = peft.get_peft_model(ours(STORED)(base), config)
    model.load_state_dict(adapters, strict=False)
    assert merged(model, tmp_path / "ours")[0] == merged(reference, tmp_path / "theirs")[0]
