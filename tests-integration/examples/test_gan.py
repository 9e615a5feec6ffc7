"""The generator comes nearer to the real images, and draws most digits; both optimizers step in each round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed here")


def test_it_learns_to_draw(example: Callable[..., Any]) -> None:
    result = example("gan", "--tiny")
    assert result["after"] < 0.6 * result["before"]
    assert result["digits"] >= 5
    assert result["steps"] == 2 * 8 * 28  # two optimizers, epochs, batches
