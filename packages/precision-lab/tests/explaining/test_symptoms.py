"""`precision why run.jsonl` starts from the symptom: alarms with their explanation, or signs and what to type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from torch import nn

import precision_lab
from precision_lab.cli import main
from precision_lab.explaining.symptoms import symptoms


def written(folder: Path, *lines: dict[str, Any], tail: str = "") -> str:
    path = folder / "run.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in lines) + tail)
    return str(path)


def step(number: int, loss: float | str = 1.0, **more: Any) -> dict[str, Any]:
    return {"step": number, "loss": loss, "norm": 1.0, "seconds": 0.1, **more}


def sample(number: int, amax: float, zero: float = 0.0) -> dict[str, Any]:
    gradient = {"dtype": "float16", "amax": 1e-6, "zero": zero}
    output = {"dtype": "float16", "amax": amax}
    return {"sample": number, "modules": {"blocks.1.down": {"output": output, "gradient": gradient}}, "parameters": {}}


def test_an_alarm_that_was_replayed_shows_its_explanation(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with torch.no_grad():
        model[1].weight.fill_(torch.nan)
    explanation = precision_lab.explain(model, torch.ones(1, 2), loss=torch.sum).as_dict()
    alarm = {"alarm": "loss", "step": 1, "text": "the loss of step 1 is nan", "explanation": explanation}
    path = written(tmp_path, {"watch": 1}, step(0), step(1, "nan"), alarm)
    found = symptoms(path)
    assert found.steps == 2 and found.explanations[0].name == "1.weight" and found.type == []
    result = CliRunner().invoke(main, ["why", path])
    assert result.exit_code == 1 and "1.weight was not finite before this forward" in result.output
    assert max(map(len, result.output.splitlines())) <= 80
    shown = json.loads(CliRunner().invoke(main, ["why", path, "--json"]).output)
    assert shown["explanations"] == [explanation] and shown["alarms"][0]["text"] == alarm["text"]


def test_one_that_was_not_says_what_was_near_the_end_and_what_to_type(tmp_path: Path) -> None:
    alarm = {"kind": "alarm", "step": 20, "what": "the loss of step 20 is inf", "unexplained": "no forward was seen"}
    first = {"watch": 1, "models": ["Model"], "modules": 12, "rank": 0}  # there "modules" is their number
    path = written(
        tmp_path, first, sample(0, 3.0), *map(step, range(20)), sample(10, 5e4, 0.75), step(20, "inf"), alarm
    )
    found = symptoms(path)
    assert "blocks.1.down's output reached 5e+04 in step 10: float16 ends at 6.55e+04." in found.signs
    assert "75 % of blocks.1.down's gradient is zero or subnormal in step 10." in found.signs
    assert "blocks.1.down's output grew from 3 to 5e+04 by step 10." in found.signs
    assert "not replayed: no forward was seen" in found.signs
    assert any(each == "if step == 20:" for each in found.type)
    result = CliRunner().invoke(main, ["why", path])
    assert result.exit_code == 1 and "the loss of step 20 is inf" in result.output
    assert "precision_lab.explain(model, (batch,)" in result.output


def test_ten_skips_are_not_the_scale(tmp_path: Path) -> None:
    steps = [step(number, skipped=number >= 5, scale=65536.0 / 2 ** max(number - 5, 0)) for number in range(16)]
    found = symptoms(written(tmp_path, *steps, {"alarm": "skips", "step": 14, "text": "10 steps in a row"}))
    assert found.signs[0].startswith("11 of 16 steps were skipped, 11 in a row at most; the loss scale went from 65536")
    assert "in the forward, or in the weights" in found.signs[0]


def test_a_run_without_an_alarm_may_be_broken_all_the_same(tmp_path: Path) -> None:
    assert symptoms(written(tmp_path, step(0), step(1), tail='{"step": 2, "lo')).type == []
    assert CliRunner().invoke(main, ["why", str(tmp_path / "run.jsonl")]).exit_code == 0
    assert "if step == 1:" in symptoms(written(tmp_path, step(0), step(1, "nan"))).type


def test_of_several_ranks_the_first_stands_first(tmp_path: Path) -> None:
    def first(rank: int) -> dict[str, Any]:
        return {"watch": 1, "rank": rank, "ranks": 2, "run": "a"}

    path = written(tmp_path, first(0), step(3), step(4, "nan"), {"alarm": "loss", "step": 4, "text": "loss is nan"})
    Path(tmp_path / "run.rank1.jsonl").write_text(
        "".join(json.dumps(each) + "\n" for each in (first(1), {"alarm": "loss", "step": 3, "text": "loss is inf"}))
    )
    found = symptoms(path)
    assert found.ranks == 2 and [each["rank"] for each in found.alarms] == [1, 0]
    output = CliRunner().invoke(main, ["why", path]).output
    assert "one rank alone: rank 1 of 2 alone went wrong first, in step 3" in " ".join(output.split())
    assert output.index("step 3, rank 1: loss is inf") < output.index("step 4, rank 0: loss is nan")
    assert json.loads(CliRunner().invoke(main, ["why", path, "--json"]).output)["first"]["rank"] == 1
