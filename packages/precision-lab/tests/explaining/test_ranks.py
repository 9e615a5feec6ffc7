"""Of alarms of several ranks the first is found: the earlier step, and within it a loss before averaged gradients."""

from __future__ import annotations

from typing import Any

import pytest

from precision_lab.explaining.ranks import First, first_rank


def alarm(step: int, kind: str = "loss", cause: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {"alarm": kind, "step": step, "text": f"{kind} of step {step}"}
    return {**found, "explanation": {"kind": cause}} if cause else found


@pytest.mark.parametrize(
    "alarms, kind, rank, step",
    [
        ({1: [alarm(4)]}, "one rank alone", 1, 4),
        ({0: [alarm(5)], 1: [alarm(4), alarm(3)]}, "one rank alone", 1, 3),
        ({0: [alarm(4, "gradients")], 2: [alarm(4)]}, "one rank alone", 2, 4),
        ({0: [alarm(4, "gradients", "another rank")], 2: [alarm(4, "gradients", "exp")]}, "one rank alone", 2, 4),
        ({0: [alarm(4)], 1: [alarm(4)], 2: [alarm(4)]}, "all ranks at once", 0, 4),
        ({0: [alarm(6)], 1: [alarm(4)], 2: [alarm(4)]}, "some ranks", 1, 4),
        ({0: [alarm(4, "gradients", "another rank")]}, "overflow over ranks", 0, 4),
    ],
)
def test_the_first(alarms: dict[int, list[dict[str, Any]]], kind: str, rank: int, step: int) -> None:
    found = first_rank(alarms, 3)
    assert isinstance(found, First) and (found.kind, found.rank, found.step) == (kind, rank, step)
    assert f"step {step}" in found.text and found.text.endswith(".")
    assert found.as_dict() == {"kind": kind, "rank": rank, "step": step, "text": found.text}


def test_none_of_one_rank_or_without_an_alarm() -> None:
    assert first_rank({0: [alarm(4)]}, 1) is None and first_rank({0: [], 1: []}, 2) is None
