"""What a scaler and a scheduler did is noted with what became of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from precision_lab.auditing.record import Record
from precision_lab.auditing.recorder import Recorder


def seen(scale: float, enabled: bool = True) -> Record:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=enabled)
    recorder = Recorder()
    with recorder:
        scheduler = StepLR(optimizer, 1, gamma=0.5)
        for _ in range(2):
            scaler.scale(model(torch.full((2, 2), 1e4)).sum()).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
    return recorder.record


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize(("scale", "ran"), [(8.0, True), (2.0**126, False)])
def test_steps_that_ran_and_that_were_skipped(scale: float, ran: bool) -> None:
    record = seen(scale)
    assert [event.ran for event in record.of("scaler_step")] == [ran, ran]
    assert [event.lrs for event in record.of("scaler_step")] == [[0.1], [0.05]]
    assert record.of("scale")[0].scale == scale and record.count("scaler_update") == 2
    assert [event.within for event in record.of("unscale")] == [False, False]
    assert len(record.of("scheduler")) == 2  # not the step that a scheduler makes as it is made
    assert record.steps == 2


def test_one_that_is_off_says_so_once() -> None:
    record = seen(8.0, enabled=False)
    assert record.count("scaler_off") == 1
    assert not record.of("scale", "scaler_step", "scaler_update", "unscale")
