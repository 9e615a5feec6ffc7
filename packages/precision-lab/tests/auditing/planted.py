"""Loops for the tests of rules: a small one that each test changes in one place."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from precision_lab.auditing.finding import Finding
from precision_lab.auditing.recorder import Recorder
from precision_lab.auditing.report import Report

AUTOCAST = torch.autocast("cpu", torch.bfloat16)


def audited(run: Callable[[], Any]) -> Report:
    """Returns the report on a loop."""
    report, recorder = Report(), Recorder()
    with recorder:
        run()
    report.fill(recorder.record)
    assert not recorder.record.unseen
    return report


def train(
    model: nn.Module,
    *inputs: Tensor,
    context: AbstractContextManager[Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Callable[[Any], Tensor] = lambda output: output.float().pow(2).mean(),
    micro_batches: int = 1,
    steps: int = 2,
) -> None:
    """Trains for two steps: forward in the context, loss outside of it, backward, step."""
    optimizer = optimizer or torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    for _ in range(steps):
        for _ in range(micro_batches):
            with context or nullcontext():
                output = model(*inputs)
            loss(output).backward()
        optimizer.step()
        optimizer.zero_grad()


def found(report: Report, code: str) -> Finding:
    """Returns the one finding of this code."""
    findings = [each for each in report.findings if each.code == code]
    assert len(findings) == 1, report.findings
    return findings[0]


def mlp(*, width: int = 16, out: int = 4) -> nn.Sequential:
    """Returns a small model."""
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, out))
