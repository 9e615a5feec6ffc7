"""Casts of a model are noted once, with what they changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from precision_lab.auditing.record import Event
from precision_lab.auditing.recorder import Recorder


def casts(dtype: torch.dtype) -> list[Event]:
    recorder = Recorder()
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with recorder:
        recorder.names.add(model)
        model.to(dtype)  # here
        model[1].float()
    return recorder.record.of("module_cast")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_of_a_model_and_of_a_part(dtype: torch.dtype) -> None:
    whole, part = casts(dtype)
    assert (whole.root, whole.path, whole.of, whole.to) == ("Sequential", "", torch.float32, dtype)
    assert whole.line is not None and whole.line.text.endswith("# here")
    assert (part.root, part.path, part.of, part.to) == ("Linear", "1", dtype, torch.float32)
    assert set(part.ids) < set(whole.ids) and len(whole.ids) == 4


def test_a_cast_that_changes_nothing_is_none() -> None:
    assert casts(torch.float32) == []


def test_a_parameter_that_is_made_in_half() -> None:
    recorder = Recorder()
    with recorder:
        nn.Linear(2, 2)
        nn.Linear(2, 2, dtype=torch.bfloat16)
        nn.Linear(2, 2, dtype=torch.float16)
    (event,) = recorder.record.of("made_half")  # the first tells where
    assert event.dtype is torch.bfloat16
