"""20,000 clean steps of a real model on real text are no alarm, in each mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from precision_core import Fabric
from precision_lab import watch
from precision_lab.gpt import GPT, GPTConfig
from precision_lab.text import split_text


@pytest.mark.full
@pytest.mark.parametrize("mode", ["bf16-mixed", "16-mixed"])
def test_clean_steps_are_no_alarm(tmp_path: Path, mode: str) -> None:
    torch.manual_seed(0)
    text = split_text()[0]
    fabric = Fabric(precision=mode, accelerator="cpu")
    model = GPT(GPTConfig(width=16, layers=1, heads=2, context=16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = fabric.setup(model, optimizer)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 500))
    steps = 20_000 if mode == "bf16-mixed" else 300  # float16 has no units on most CPUs
    with watch(model, optimizer, file=tmp_path / "a.jsonl") as watched:
        for number in range(steps):
            start = torch.randint(len(text) - 17, (2, 1)) + torch.arange(17)
            ids = text[start].long()
            loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            fabric.backward(loss)
            if number % 2:
                fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            warmup.step()
            optimizer.zero_grad()
    assert watched.alarms == [] and watched.steps == steps
