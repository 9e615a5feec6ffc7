"""A loop under observation computes what it computes without, and is seen as it is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import nn

from precision_lab.auditing.recorder import Recorder


def train(context: AbstractContextManager[object], dtype: torch.dtype | None, compiled: bool = False) -> list[float]:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.LayerNorm(16), nn.Dropout(0.1))
    model = nn.Sequential(block, nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = torch.compile(model) if compiled else model
    losses = []
    with context:
        for _ in range(3):
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                loss = nn.functional.cross_entropy(run(torch.randn(8, 16)), torch.randint(4, (8,)))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return [*losses, *(float(param.detach().double().sum()) for param in model.parameters())]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_loop_computes_the_same_bits(dtype: torch.dtype | None) -> None:
    assert train(Recorder(), dtype) == train(nullcontext(), dtype)


def test_nothing_stays_replaced() -> None:
    before = torch.autocast.__enter__, torch.Tensor.backward, torch.save, torch.optim.lr_scheduler.StepLR.step
    hooks = nn.modules.module._global_forward_hooks.copy()
    with pytest.raises(ZeroDivisionError), Recorder():
        raise ZeroDivisionError
    assert before == (
        torch.autocast.__enter__,
        torch.Tensor.backward,
        torch.save,
        torch.optim.lr_scheduler.StepLR.step,
    )
    assert nn.modules.module._global_forward_hooks == hooks


def test_products_have_module_dtype_and_line_in_backward_too() -> None:
    recorder = Recorder()
    train(recorder, torch.bfloat16)
    products = {(op.module, op.phase, op.inputs[-1]) for op in recorder.record.ops if op.kind == "matmul"}
    assert products == {(module, phase, torch.bfloat16) for module in ("0.0", "1") for phase in ("forward", "backward")}
    lines = {op.line.text for op in recorder.record.ops if op.kind == "matmul" and op.line}
    assert lines == {"loss = nn.functional.cross_entropy(run(torch.randn(8, 16)), torch.randint(4, (8,)))"}
    assert recorder.record.steps == 3
