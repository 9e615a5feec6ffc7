"""QLoRA of the small GPT on real text, in each mode, beside the same adapters on float32 weights.

A GPT of `precision compare` is trained in float32 on the first half of the text for some steps, then adapters of rank 8
on all its linear layers on the second half, with everything else frozen: the loss that remains over the float32 base's
is what the quantised weights cost. The same weights, adapters, batches and steps in each mode; both losses are means of
the last 20 steps, in nats per byte.

    --with peft precision-lab
"""

from __future__ import annotations

import argparse
import copy
import logging
import time
import warnings
from typing import Any

import torch
from _measure import print_table
from torch import Tensor, nn
from torch.optim import AdamW

from precision_bnb import MODES, BitsandbytesPrecision
from precision_core import Fabric
from precision_lab.gpt import GPT, GPTConfig
from precision_lab.text import split_text

TARGETS = ["qkv", "out", "up", "down"]


def main() -> None:
    parser = argparse.ArgumentParser(description="QLoRA beside LoRA.")
    parser.add_argument("--base-steps", type=int, default=150)
    parser.add_argument("--steps", type=int, default=100)
    options, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    data, held_out = split_text()
    first, second = data[: len(data) // 2], data[len(data) // 2 :]
    torch.manual_seed(0)
    base = GPT(GPTConfig())
    fit(Fabric(accelerator="cpu"), base, first, options.base_steps, 2e-3)
    rows = []
    for mode in ("32-true", *(mode for mode in MODES if mode != "int8-training")):
        plugin: Any = mode if mode == "32-true" else BitsandbytesPrecision(mode, torch.float32)
        fabric, model = Fabric(accelerator="cpu", precision=plugin), copy.deepcopy(base).requires_grad_(False)
        model = adapted(fabric.precision_plugin.convert_module(model))
        start = evaluate(model, held_out)
        began = time.process_time()
        loss = fit(fabric, model, second, options.steps, 2e-3)
        seconds = (time.process_time() - began) / options.steps
        size = sum(param.nbytes for param in model.parameters() if not param.requires_grad) / 2**20
        end = evaluate(model, held_out)
        rows.append([mode, f"{size:.2f}", f"{start:.4f}", f"{loss:.4f}", f"{end:.4f}", f"{1e3 * seconds:.0f}"])
    head = ["mode", "frozen MiB", "held out before", "training", "held out after", "CPU ms a step"]
    print_table(f"LoRA of rank 8, {options.steps} steps", head, rows)


def adapted(model: nn.Module) -> Any:
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    return peft.get_peft_model(model, config)


def fit(fabric: Fabric, model: Any, data: Tensor, steps: int, rate: float) -> float:
    optimizer = AdamW([param for param in model.parameters() if param.requires_grad], lr=rate, betas=(0.9, 0.99))
    fabric.setup(model, optimizer)
    losses = []
    for step in range(steps):
        ids = batch_of(data, step)
        optimizer.zero_grad()
        loss = loss_of(model(ids[:, :-1]), ids)
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


def batch_of(data: Tensor, step: int) -> Tensor:
    starts = torch.randint(0, len(data) - 129, (8,), generator=torch.Generator().manual_seed(step % 2**31))
    return torch.stack([data[start : start + 129] for start in starts.tolist()])


@torch.no_grad()
def evaluate(model: nn.Module, data: Tensor) -> float:
    model.eval()
    losses = [loss_of(model(ids[:, :-1]), ids).item() for ids in (batch_of(data, -1 - step) for step in range(12))]
    model.train()
    return sum(losses) / len(losses)


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


if __name__ == "__main__":
    main()
