"""An explanation survives a file, and its first remedy is one that helps."""

from __future__ import annotations

import json

import pytest

from precision_lab.auditing.where import Line
from precision_lab.explaining.explanation import Explanation, Remedy
from precision_lab.explaining.numbers import Numbers


@pytest.mark.parametrize(
    "outcome, helps",
    [
        ("finite", True),
        ("finite: the operation alone, on its operands", True),
        ("better: of 64 such steps 0 % of the way is lost, where it was 98 %", True),
        ("no better: of 64 such steps 98 % of the way is lost", False),
        ("not finite", False),
        ("not tried", False),
        ("RuntimeError: finite", False),
    ],
)
def test_what_helps(outcome: str, helps: bool) -> None:
    assert Remedy("code", "a", "b", outcome).helps is helps


def test_through_a_file() -> None:
    numbers = Numbers("float16", (2, 3), 0.5, 3.0, 0.0, 0.5, 0.0)
    remedies = [Remedy("code", "a", "b"), Remedy("exception", "c", "d", "finite")]
    found = Explanation("overflow", "it did.", "forward", "mul", module="m", operands=[numbers], output=numbers)
    found.remedies, found.line = remedies, Line(__file__, 3, "f")
    again = Explanation.from_dict(json.loads(json.dumps(found.as_dict())))
    assert again.as_dict() == found.as_dict()
    assert again.remedy is not None and again.remedy.ours == "c"
