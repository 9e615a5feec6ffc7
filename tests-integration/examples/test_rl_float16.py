"""Both policies learn, and float16's trainer and rollout are several times nearer to each other than bfloat16's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_the_difference_is_a_number_and_float16s_is_smaller(example: Callable[..., Any]) -> None:
    results = example("rl_float16", "--tiny")
    for result in results.values():
        assert result["reward"] > 0.5 and result["first"] < 0.2
        assert result["gap"] > 0
    assert results["bf16"]["gap"] > 4 * results["16"]["gap"]  # three bits more: 8, less what else differs
