"""`needs`: runs where the hardware is, and says what is missing elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from precision_core.testing import needs, required_hardware


def outcome(mark: Any) -> tuple[bool, str]:
    return mark.mark.args[0], mark.mark.kwargs["reason"]


@needs("cpu")
def test_a_cpu_is_everywhere() -> None:
    assert outcome(needs("cpu"))[0] is False


@needs("quantum")
def test_what_is_nowhere_is_skipped() -> None:
    raise AssertionError


@pytest.mark.parametrize(
    ("arguments", "found", "reason"),
    [
        (("cuda",), 0, "needs 1 cuda device: torch finds no cuda device here"),
        (("cuda", 2), 0, "needs 2 cuda devices: torch finds no cuda device here"),
        (("cuda", 2), 1, "needs 2 cuda devices: torch finds 1"),
        (("cuda", 2), 2, None),
    ],
)
def test_the_reason_says_what_is_needed_and_what_is_here(
    arguments: tuple[Any, ...], found: int, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(required_hardware, "is_available", lambda device_type: found > 0)
    monkeypatch.setattr(required_hardware, "device_count", lambda device_type: found)
    skips, text = outcome(needs(*arguments))
    assert skips is (reason is not None) and text.startswith(reason or "needs 2 cuda devices")


@pytest.mark.parametrize(("here", "skips"), [("8.0", True), ("8.9", False), ("9.0", False)])
def test_a_compute_capability_is_a_minimum(
    here: str, skips: bool, nvidia_smi: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(required_hardware, "is_available", lambda device_type: True)
    monkeypatch.setattr(required_hardware, "device_count", lambda device_type: 1)
    nvidia_smi(here)
    skipped, reason = outcome(needs("cuda", capability=(8, 9)))
    assert skipped is skips and not torch.cuda.is_initialized()
    assert reason.startswith("needs 1 cuda device of compute capability 8.9 or newer")
    assert not skips or reason.endswith(": this one has 8.0")
