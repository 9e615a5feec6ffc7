"""Conditions come to what Python makes of them, or to None where a part is not known."""

from __future__ import annotations

import ast
from typing import Any

import pytest

from precision_bnb.reading.folding import folded

KNOWN: dict[str, Any] = {"one": 1, "yes": True, "no": False, "none": None, "name": "x"}


def fold(test: str) -> bool | None:
    def plain(node: ast.expr) -> list[Any]:
        return [KNOWN[node.id]] if isinstance(node, ast.Name) and node.id in KNOWN else []

    return folded(ast.parse(test, mode="eval").body, plain)


@pytest.mark.parametrize(
    "test",
    [
        *("one", "not yes", "one > 1", "one >= 1", "one == 1 and yes", "no or none", "name == 'x'", "name != 'x'"),
        *("one < 2", "none is None", "none is not None", "one <= 0 or not (no or none)", "yes and one"),
    ],
)
def test_known_ones_are_what_python_says(test: str) -> None:
    assert fold(test) is bool(eval(test, dict(KNOWN)))


@pytest.mark.parametrize(
    ("test", "result"),
    [
        ("unknown", None),
        ("not unknown", None),
        ("unknown and no", False),
        ("unknown and yes", None),
        ("yes or unknown", True),
        ("no or unknown", None),
        ("unknown > 1", None),
        ("0 < one < 2", None),
        ("name > 1", None),
        ("f(one)", None),
    ],
)
def test_unknown_parts_leave_it_open_unless_another_decides(test: str, result: bool | None) -> None:
    assert fold(test) is result
