"""What a library was asked for is read from its object, and told where it did not run."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from precision_core import Fabric
from precision_lab.auditing.context import audit
from precision_lab.auditing.record import Asked
from precision_lab.auditing.rules_asked import asked_and_not_done


def test_our_own_host_says_what_it_was_asked_for() -> None:
    """The one whose backward is called, whichever others are alive."""
    others = [Fabric(accelerator="cpu", precision=mode) for mode in ("32-true", "64-true")]
    fabric = Fabric(accelerator="cpu", precision="bf16-true")
    model = nn.Linear(4, 4)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with audit() as report:
        fabric.backward(model(torch.ones(2, 4)).sum())
        optimizer.step()
    asked = [replace(each, line=None) for each in report.record.asked]
    assert asked == [Asked("precision", 'Fabric(precision="bf16-true")', torch.bfloat16, True)] and others
    assert not report.at("warning")


def test_another_dtype_of_products_is_an_error() -> None:
    model = nn.Linear(4, 4)
    with audit() as report:
        for _ in range(2):
            model(torch.ones(2, 4)).sum().backward()
    record = report.record
    record.asked = [Asked("Accelerate", 'Accelerator(mixed_precision="fp16")', torch.float16, False)]
    (finding,) = asked_and_not_done(record)
    assert (finding.code, finding.level) == ("asked-and-not-done", "error")
    assert "all matrix products ran in float32" in finding.what
    assert "bf16" in finding.remedy.for_(["Accelerate"]) and "Fabric" in finding.remedy.for_(["precision"])
    for dtype in (torch.float32, None):
        record.asked = [replace(record.asked[0], compute=dtype)]
        assert not list(asked_and_not_done(record))
