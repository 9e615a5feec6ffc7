"""The CNN learns, and a run that stopped in the middle of an epoch goes on bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed here")


def test_it_learns_and_resumes_in_the_middle_of_an_epoch(example: Callable[..., Any], tmp_path: Path) -> None:
    options = ("--tiny", "--checkpoint", str(tmp_path / "digits.ckpt"))
    through = example("digits_cnn", *options)
    assert through["accuracy"] > 0.7
    stopped = example("digits_cnn", *options, "--stop-after", "33")  # of 23 steps an epoch; the last checkpoint has 30
    assert stopped["step"] == 33
    assert example("digits_cnn", *options, "--resume") == through
