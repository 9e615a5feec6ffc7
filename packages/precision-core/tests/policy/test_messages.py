"""Parts of messages: the name that was meant, and the first of many."""

from __future__ import annotations

import pytest

from precision_core.policy import listed, nearest


@pytest.mark.parametrize(
    ("names", "count", "text"),
    [
        ([], 3, ""),
        (["a"], 3, "a"),
        (iter("abc"), 3, "a, b, c"),
        (iter("abcde"), 3, "a, b, c and 2 more"),
        ([str(number) for number in range(11)], 10, "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 1 more"),
    ],
)
def test_the_first_are_named_and_the_rest_is_counted(names: list[str], count: int, text: str) -> None:
    assert listed(names, count) == text


@pytest.mark.parametrize(
    ("given", "allowed", "hint"),
    [
        ("comput", ["params", "compute"], '; did you mean "compute"?'),
        ("COMPUTE ", ["params", "compute"], '; did you mean "compute"?'),
        ("lm_head", ["LM_Head"], '; did you mean "LM_Head"?'),
        ("zzz", ["params", "compute"], ""),
        ("x", [], ""),
    ],
)
def test_nearest(given: str, allowed: list[str], hint: str) -> None:
    assert nearest(given, allowed) == hint
