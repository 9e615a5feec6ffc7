"""Files of a watch: the last run of each rank, and those of other ranks beside them that belong to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from precision_lab.cli import main
from precision_lab.explaining.files import all_of, beside, of_rank, read, runs_of


def first(rank: int, run: str = "job/1", time: str = "2026-01-01T00:00:00+0000") -> dict[str, Any]:
    return {"watch": 1, "rank": rank, "ranks": 2, "run": run, "time": time}


def write(path: Path, *lines: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return str(path)


def test_names() -> None:
    assert of_rank("a/run.jsonl", 3) == "a/run.rank3.jsonl" and of_rank("a/run.rank3.jsonl", 0) == "a/run.jsonl"
    assert of_rank("run", 1) == "run.rank1" and of_rank("run.rank1.jsonl", 2) == "run.rank2.jsonl"


def test_the_last_run_of_each_rank(tmp_path: Path) -> None:
    lines = [first(0), {"step": 1}, {"alarm": "loss", "step": 1}, first(1), {"step": 7}, first(0), {"step": 2}]
    zero, one = runs_of(write(tmp_path / "both.jsonl", *lines))
    assert (zero.rank, zero.lines, zero.alarms) == (0, [{"step": 2}], []) and (one.rank, one.lines) == (
        1,
        [{"step": 7}],
    )


def test_files_beside_it_of_the_same_run(tmp_path: Path) -> None:
    zero = write(tmp_path / "run[1].jsonl", first(0), {"step": 1})
    one = write(
        tmp_path / "run[1].rank1.jsonl", first(1, time="2026-01-01T00:05:00+0000"), {"alarm": "loss", "step": 3}
    )
    write(tmp_path / "run[1].ranked.jsonl", first(1), {"step": 1})
    assert beside(zero) == [one] and beside(one) == [zero]
    assert [run.rank for run in all_of([zero])] == [0, 1] == [run.rank for run in all_of([one])]
    for other in (first(1, "job/2"), first(1, time="2026-01-01T00:11:00+0000")):
        write(tmp_path / "run[1].rank1.jsonl", other, {"alarm": "loss", "step": 3})
        assert [run.rank for run in all_of([zero])] == [0]
        assert [run.rank for run in all_of([zero, one])] == [0, 1]  # it was asked for


@pytest.mark.parametrize(
    "text, message",
    [
        ("hello\nworld\n", "line 1: expected JSON"),
        ("[1]\n", "line 1: expected an object"),
        ("{}\n", "no line has a step"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read(str(path))
    result = CliRunner().invoke(main, ["why", str(path)])
    assert result.exit_code == 2 and message in " ".join(result.output.replace("│", " ").split())
