"""Steps without an optimizer: counted, and looked at like an optimizer's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from planted import audited, found
from torch import nn

from precision_lab.auditing.recorder import Recorder

Params = list[nn.Parameter]
HALF = torch.bfloat16


def subtracted(params: Params) -> None:
    for param in params:
        param -= 1e-5 * param.grad  # type: ignore[operator]  # here


def of_data(params: Params) -> None:
    for param in params:
        param.data.add_(param.grad, alpha=-1e-5)  # type: ignore[arg-type]  # here


def copied(params: Params) -> None:
    for param in params:
        param.copy_(param - 1e-5 * param.grad)  # type: ignore[operator]  # here


def together(params: Params) -> None:
    torch._foreach_add_(params, [param.grad for param in params], alpha=-1e-5)  # here


WRITES = [subtracted, of_data, copied, together]


def loop(write: Callable[[Params], None], dtype: torch.dtype = HALF) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)).to(dtype)
    for _ in range(3):
        model(torch.randn(8, 16, dtype=dtype)).square().mean().backward()
        with torch.no_grad():
            write(list(model.parameters()))
        model.zero_grad()


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_updates_by_hand_that_round_to_nothing_are_found(write: Callable[[Params], None]) -> None:
    finding = found(audited(lambda: loop(write)), "updates-round-to-nothing")
    assert finding.level == "warning"
    assert finding.line is not None and finding.line.text.endswith("# here")


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_in_float32_they_are_right(write: Callable[[Params], None]) -> None:
    report = audited(lambda: loop(write, torch.float32))
    assert report.findings == [] and set(report.record.trained.values()) == {torch.float32}


def test_they_are_counted_as_steps() -> None:
    seen: list[int] = []
    with Recorder(seen.append):
        loop(subtracted)
    assert seen[-1] == 2 and sorted(set(seen)) == [0, 1, 2]


def test_what_no_gradient_is_in_is_no_step() -> None:
    def decay(params: Params) -> None:
        for param in params:
            param.mul_(0.99)
            param.add_(torch.randn_like(param), alpha=1e-9)

    report = audited(lambda: loop(decay))
    assert not report.record.of("hand_step") and report.record.updates == []
