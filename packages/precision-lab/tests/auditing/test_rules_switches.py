"""TF32 that is asked for twice, or too late; on a machine without CUDA worth knowing alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from precision_lab.auditing.context import audit
from precision_lab.auditing.record import Record
from precision_lab.auditing.rules_switches import differs, switched


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def run(first: str | None, second: str | None) -> Record:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with audit(model, optimizer) as report:
        if first is not None:
            torch.set_float32_matmul_precision(first)  # first
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        if second is not None:
            torch.set_float32_matmul_precision(second)
    return report.record


@pytest.mark.parametrize(("first", "second"), [("high", "highest"), ("highest", "medium"), (None, "high")])
def test_a_switch_that_was_set_otherwise_is_told(first: str | None, second: str) -> None:
    record = run(first, second)
    (finding,) = switched(record)
    assert (finding.code, finding.level) == ("tf32-switched", "info")
    assert repr(second) in finding.what
    assert ("asked for" in finding.what) is (first is not None)
    record.devices = ["cuda"]
    assert [each.level for each in switched(record)] == ["warning"]


@pytest.mark.parametrize(
    ("first", "second"), [("high", None), ("high", "medium"), ("highest", "highest"), (None, None)]
)
def test_a_switch_that_was_set_once_is_right(first: str | None, second: str | None) -> None:
    assert list(switched(run(first, second))) == []


def test_the_older_switch_counts_too() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    model = nn.Linear(4, 2)
    try:
        with audit(model) as report:
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.set_float32_matmul_precision("highest")
        (finding,) = switched(report.record)
        assert "torch.backends.cuda.matmul.allow_tf32 = True" in finding.what
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(
    ("matmul", "cudnn", "said"),
    [
        ("highest", True, "allow_tf32 = True: convolutions run in TF32, and matrix products do not"),
        ("high", False, "allow_tf32 = False: matrix products run in TF32, and convolutions do not"),
        ("highest", None, "'highest': convolutions run in TF32, and matrix products do not, which is torch's default"),
        ("high", True, ""),
        ("highest", False, ""),
        (None, None, ""),
    ],
)
def test_convolutions_have_a_switch_of_their_own(matmul: str | None, cudnn: bool | None, said: str) -> None:
    before = torch.backends.cudnn.allow_tf32
    model = nn.Conv1d(2, 2, 2)
    try:
        with audit(model) as report:
            if matmul is not None:
                torch.set_float32_matmul_precision(matmul)
            if cudnn is not None:
                torch.backends.cudnn.allow_tf32 = cudnn
            model(torch.ones(1, 2, 4)).sum().backward()
        found = [each.what for each in differs(report.record)]
        assert len(found) == bool(said) and all(said in each for each in found)
        assert list(switched(report.record)) == []
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_without_convolutions_their_switch_does_not_matter() -> None:
    assert list(differs(run("highest", None))) == []
