"""Training loops of libraries that are right, written after their own examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from right_torch import data, mlp

LOOPS: dict[str, Callable[[str], Any]] = {}


def loop(needs: str) -> Callable[[Callable[[str], Any]], Callable[[str], Any]]:
    """Adds a loop to the table, under the library that it needs."""

    def add(function: Callable[[str], Any]) -> Callable[[str], Any]:
        LOOPS[f"{needs}:{function.__name__}"] = function
        return function

    return add


def _accelerate(mode: str, folder: str, micro_batches: int = 1) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision=mode, cpu=True, gradient_accumulation_steps=micro_batches)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, data(), scheduler)
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    accelerator.save_state(folder)


@loop("accelerate")
def accelerate_bf16(folder: str) -> None:
    _accelerate("bf16", folder)


@loop("accelerate")
def accelerate_float32_accumulation(folder: str) -> None:
    _accelerate("no", folder, micro_batches=2)


def _lightning(mode: Any, folder: str) -> None:
    import lightning_fabric

    fabric = lightning_fabric.Fabric(accelerator="cpu", devices=1, precision=mode)
    fabric.launch()
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    wrapped, optimizer = fabric.setup(model, optimizer)
    for x, y in fabric.setup_dataloaders(data()):
        optimizer.zero_grad()
        loss = F.cross_entropy(wrapped(x), y)
        fabric.backward(loss)
        fabric.clip_gradients(wrapped, optimizer, max_norm=1.0)
        optimizer.step()
    fabric.save(f"{folder}/last.ckpt", {"model": wrapped, "optimizer": optimizer})


@loop("lightning_fabric")
def lightning_bf16_mixed(folder: str) -> None:
    _lightning("bf16-mixed", folder)


@loop("lightning_fabric")
def lightning_32_true(folder: str) -> None:
    _lightning("32-true", folder)


@loop("lightning_fabric")
def lightning_64_true(folder: str) -> None:
    _lightning("64-true", folder)


@loop("lightning_fabric")
def lightning_bf16_true(folder: str) -> None:
    _lightning("bf16-true", folder)


class Sentences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(index, index + 12) % 60
        return {"input_ids": ids, "labels": ids}


def _trainer(folder: str, **arguments: Any) -> None:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    model = transformers.LlamaForCausalLM(config)
    options = transformers.TrainingArguments(
        folder, max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True, **arguments
    )
    transformers.Trainer(model, options, train_dataset=Sentences()).train()


@loop("transformers")
def trainer_bf16(folder: str) -> None:
    _trainer(folder, bf16=True)


@loop("transformers")
def trainer_float32_checkpointing(folder: str) -> None:
    _trainer(folder, gradient_checkpointing=True, gradient_accumulation_steps=2)


def _own_loop(model_class: str, config_class: str, **config: Any) -> None:
    import transformers

    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(3):
        ids = torch.randint(60, (2, 300))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


_SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
}


@loop("transformers")
def llama_by_hand(folder: str) -> None:
    _own_loop("LlamaForCausalLM", "LlamaConfig", **_SMALL)


@loop("transformers")
def gpt2_by_hand(folder: str) -> None:
    _own_loop("GPT2LMHeadModel", "GPT2Config", n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=300)


@loop("transformers")
def bert_by_hand(folder: str) -> None:
    _own_loop("BertForMaskedLM", "BertConfig", **_SMALL)


@loop("transformers")
def t5_by_hand(folder: str) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 64}
    _own_loop("T5ForConditionalGeneration", "T5Config", decoder_start_token_id=0, **sizes)


def _ours(mode: Any, folder: str) -> None:
    from precision_core import Fabric

    fabric = Fabric(accelerator="cpu", precision=mode)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    fabric.setup(model, optimizer)
    for x, y in fabric.setup_dataloaders(data()):
        optimizer.zero_grad()
        fabric.backward(F.cross_entropy(model(x), y))
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
    fabric.save(f"{folder}/last.ckpt", {"model": model, "optimizer": optimizer})


for _mode in ("64-true", "32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "16-master", "bf16-master",
              "bf16-stochastic", "bf16-mixed; 2: 32-true"):  # fmt: skip
    LOOPS[f"precision_core:{_mode}"] = lambda folder, mode=_mode: _ours(mode, folder)
LOOPS["precision_bnb:nf4"] = lambda folder: _ours("nf4", folder)
LOOPS["precision_te:fp8-reference"] = lambda folder: _ours("fp8-reference", folder)
