"""`with precision_lab.audit(model, optimizer) as report:` around a loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.optim import Optimizer

from precision_lab.auditing.recorder import Recorder
from precision_lab.auditing.report import Report


@contextmanager
def audit(*watched: nn.Module | Optimizer) -> Iterator[Report]:
    """Observes the training loop in the `with`, of any library; the report is filled when it ends.

    The loop computes what it computes without it, bit for bit; it takes several times as long, so two steps are enough.

    Args:
        watched: models and optimizers that are to be reported. Others that run are found by themselves.

    Raises:
        TypeError: something else was given.
    """
    for each in watched:
        if not isinstance(each, (nn.Module, Optimizer)):
            raise TypeError(f"audit(...): expected models and optimizers of torch, got {type(each).__name__}")
    report = Report()
    recorder = Recorder()
    for each in watched:
        if isinstance(each, nn.Module):
            recorder.names.add(each)
        else:
            recorder.optimizers[id(each)] = each
    try:
        with recorder:
            yield report
    finally:
        report.fill(recorder.record)
