"""Numbers are looked at where they are rounded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from precision_lab.auditing.record import Record
from precision_lab.auditing.recorder import Recorder

HALF = torch.bfloat16


def seen(run: Callable[[], Tensor]) -> Record:
    recorder = Recorder()
    with recorder:
        run()
    return recorder.record


@pytest.mark.parametrize(
    ("run", "largest"),
    [
        (lambda: torch.arange(1000).to(HALF), 999),
        (lambda: torch.arange(1000.0).to(HALF), 999),
        (lambda: torch.arange(5000).half(), 4999),
        (lambda: torch.arange(1000, dtype=HALF), 1000),  # rounded as it is made
        (lambda: torch.zeros(1000, dtype=HALF).copy_(torch.arange(1000)), 999),
        (lambda: torch.arange(1000) * torch.ones(1000, dtype=HALF), 999),
    ],
)
def test_whole_numbers_that_are_rounded(run: Callable[[], Tensor], largest: float) -> None:
    (event,) = seen(run).integers
    assert event.largest == largest


@pytest.mark.parametrize(
    "run",
    [
        lambda: torch.arange(200).to(HALF),
        lambda: torch.arange(1000).float(),
        lambda: torch.arange(2000).half(),
        lambda: torch.randn(1000).mul(1000).to(HALF),
        lambda: torch.tensor([0.0, -1e9] * 8).to(HALF),  # a mask
        lambda: (torch.ones(16) * 65535).to(HALF)[:1],
    ],
)
def test_others(run: Callable[[], Tensor]) -> None:
    assert seen(run).integers == []


@pytest.mark.parametrize(
    ("run", "of"),
    [
        (lambda: torch.linspace(0, 90, 64).to(HALF).cos(), HALF),
        (lambda: torch.linspace(0, 90, 64).half().float().sin(), torch.float16),
        (lambda: torch.linspace(0, 6, 64).to(HALF).cos(), None),  # outside of a model: a wave
        (lambda: torch.linspace(0, 90, 64).sin(), None),
    ],
)
def test_angles_in_half(run: Callable[[], Tensor], of: torch.dtype | None) -> None:
    assert [event.of for event in seen(run).angles] == ([] if of is None else [of])
