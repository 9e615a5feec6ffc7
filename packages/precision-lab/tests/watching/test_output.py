"""Files: JSON throughout, of rank zero; alarms of other ranks beside it; curves where a board is installed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from precision_lab import watch
from precision_lab.watching.lines import Lines
from precision_lab.watching.output import ranks


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(path: Path, steps: int, **options: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, every=2, file=path, **options):
        for number in range(steps):
            (model(torch.randn(3, 4)).square().mean() * (math.inf if number == 3 else 1)).backward()
            if number != 3:
                optimizer.step()
            optimizer.zero_grad()


def test_numbers_that_are_not_finite_are_texts(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "a" / "b.jsonl")
    lines.write({"a": [math.nan, {"b": -math.inf}], "c": 1.5})
    assert not (tmp_path / "a").exists()  # lines wait to be written together
    lines.write({"d": math.inf}, flush=True)
    assert read(tmp_path / "a" / "b.jsonl") == [{"a": ["nan", {"b": "-inf"}], "c": 1.5}, {"d": "inf"}]
    lines.write({"e": 1})
    lines.close()
    assert len(read(tmp_path / "a" / "b.jsonl")) == 3


def test_other_ranks_write_their_alarms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ranks() == (1, 2)
    train(tmp_path / "run.jsonl", steps=3)
    assert list(tmp_path.iterdir()) == []
    train(tmp_path / "run.jsonl", steps=6)
    (path,) = tmp_path.iterdir()
    assert path.name == "run.rank1.jsonl"
    first, alarm = read(path)
    assert (first["rank"], first["ranks"], alarm["alarm"]) == (1, 2, "loss")


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path / "run.jsonl", steps=6, tensorboard=tmp_path / "board")
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    lines = [line for line in read(tmp_path / "run.jsonl") if "step" in line and "alarm" not in line]
    found = [(each.step, each.value) for each in events.Scalars("watch/loss")]
    assert found == [(line["step"], pytest.approx(float(line["loss"]), rel=1e-6)) for line in lines]
    (sample, *_) = [line for line in read(tmp_path / "run.jsonl") if "sample" in line]
    amax = events.Scalars("watch/modules/0/gradient/amax")[0]
    assert (amax.step, amax.value) == (2, pytest.approx(sample["modules"]["0"]["gradient"]["amax"], rel=1e-6))
    assert "watch/alarm/text_summary" in events.Tags()["tensors"]


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"Call wandb.init\(\) before"):
        train(tmp_path / "run.jsonl", steps=1, wandb=True)
    run = wandb.init(mode="offline", project="watch", dir=str(tmp_path))
    train(tmp_path / "run.jsonl", steps=6, wandb=True)
    lines = [line for line in read(tmp_path / "run.jsonl") if "step" in line and "alarm" not in line]
    assert run.summary["watch/step"] == lines[-1]["step"] and run.summary["watch/loss"] == lines[-1]["loss"]
    assert run.summary["watch/modules/0/output/amax"] > 0
    run.finish()


@pytest.mark.parametrize(("name", "value"), [("tensorboard", "board"), ("wandb", True)])
def test_a_board_that_is_not_installed(tmp_path: Path, name: str, value: Any) -> None:
    import importlib.util

    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(ImportError, match=f"pip install {name}"):
        train(tmp_path / "run.jsonl", steps=1, **{name: value})


SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from precision_lab import watch

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
ddp = DistributedDataParallel(model)
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
torch.manual_seed(rank)
with watch(ddp, optimizer, every=2, file=sys.argv[1]) as watched:
    for number in range(6):
        loss = ddp(torch.randn(8, 4)).square().mean()
        if rank == 1 and number == 3:
            loss = loss * float("nan")
        loss.backward()
        if number == 3:
            optimizer.zero_grad()
        optimizer.step()
        optimizer.zero_grad()
with open(f"result{rank}", "w") as file:  # of a shared stdout lines may mix
    print(watched.steps, [(alarm.kind, alarm.step) for alarm in watched.alarms], file=file)
dist.destroy_process_group()
"""


@pytest.mark.full
def test_each_rank_of_ddp_watches_and_the_first_writes(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "train.py",
        "a.jsonl",
    ]
    done = subprocess.run(
        [*command, "a.jsonl"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    results = [(tmp_path / f"result{rank}").read_text() for rank in (0, 1)]
    assert results == ["6 []\n", "6 [('loss', 4)]\n"]
    lines = read(tmp_path / "a.jsonl")
    assert (lines[0]["rank"], lines[0]["ranks"]) == (0, 2)
    assert [line["step"] for line in lines if "step" in line] == [1, 2, 3, 4, 5, 6]
    (sample, *_) = [line for line in lines if "sample" in line]
    assert set(sample["modules"]) == {"0", "1", "2"} and "0.weight" in sample["parameters"]
    first, alarm = read(tmp_path / "a.rank1.jsonl")
    assert (first["rank"], alarm["alarm"], alarm["step"]) == (1, "loss", 4)
