"""FP8 trains as bf16-mixed does, and NVFP4's losses are another's: the narrow format was computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

for name in ("precision_te", "sklearn.datasets"):
    pytest.importorskip(name, reason=f"{name} is not installed here")


def test_it_learns_in_each_format(example: Callable[..., Any]) -> None:
    results = example("fp8_reference", "--tiny")
    start = 2.3  # of equal chances
    assert all(mean < 0.5 * start for mean, _ in results.values())
    differences = {mode: abs(mean - results["bf16-mixed"][0]) for mode, (mean, _) in results.items()}
    assert 0 < differences["fp8-reference"] < 0.1
    assert 0 < differences["nvfp4-reference"] < 0.3
