"""The plugins' hooks train in each mode without a host, and a run that goes on ends as one that never stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed here")


@pytest.mark.parametrize("mode", ["64-true", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"])
def test_it_learns(example: Callable[..., Any], mode: str) -> None:
    result = example("custom_loop", "--tiny", "--precision", mode)
    assert result["accuracy"] > 0.8
    assert result["scale"] == (4096.0 if mode == "16-mixed" else 1.0)


def test_it_goes_on_from_its_checkpoint(example: Callable[..., Any], tmp_path: Path) -> None:
    through = example("custom_loop", "--tiny")
    first = until(2, example, tmp_path)
    assert first["checksum"] != through["checksum"]
    assert until(4, example, tmp_path) == through


def until(epochs: int, example: Callable[..., Any], folder: Path) -> Any:
    """Runs what --tiny is, for some epochs."""
    options = ("--epochs", str(epochs), "--width", "64", "--device", "cpu", "--checkpoint", str(folder / "last.pt"))
    return example("custom_loop", *options)
