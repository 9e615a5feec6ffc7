"""`precision compare` under the strategies that packages bring: the same training, or a row with the reason."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import precision_lab.train as train_module
from precision_core.testing import curve_distance, loss_bound, run_in_ranks
from precision_lab.gpt import GPTConfig
from precision_lab.loop import Job
from precision_lab.progress import make_progress
from precision_lab.results import Comparison
from precision_lab.rows import make_rows
from precision_lab.text import split_text
from precision_lab.turns import run

STEPS = 4
MODES = ["64-true", "32-true", "bf16-mixed"]

Compare = Callable[..., dict[str, Any]]
"""The strategy and the number of processes -> each mode's row of the record."""


def compare_in_ranks(strategy: str = "auto", devices: int = 1) -> dict[str, Any]:
    """The comparison of the command, with forked ranks where that starts torchrun."""
    rows = make_rows(MODES, "cpu", named=True, run_slow=False, strategy=strategy, devices=devices)
    comparison = Comparison(STEPS, 0, rows, strategy)
    with make_progress(Console(file=io.StringIO()), rows, STEPS) as progress:
        run(comparison, "cpu", progress, devices, start=Ranks)
    return {row["mode"]: row for row in comparison.as_dict({})["modes"]}


class Ranks:
    """In place of a child: the ranks of the tests, which train all at once when they are first asked."""

    def __init__(self, job: Job, told: bool) -> None:
        self._job, self._events = job, None

    def tell(self, command: str) -> None:
        pass

    def events(self, until: str | None = None) -> Iterator[dict[str, Any]]:
        job = self._job
        if self._events is None:
            if job.strategy == "deepspeed":  # it leaves traces: a closure gets processes of its own
                self._events = iter(run_in_ranks(job.devices, lambda: events(job))[0])
            else:
                self._events = iter(run_in_ranks(job.devices, events, job)[0])
        if until != "ready":  # all the rest at once
            yield from self._events

    def close(self) -> None:
        pass


def events(job: Job) -> list[dict[str, Any]]:
    """What training says in a child process, of a smaller model and with little to evaluate."""
    training, held_out = split_text()
    torch.use_deterministic_algorithms(True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "split_text", lambda: (training, held_out[:400]))
        patch.setattr(train_module, "GPTConfig", lambda: GPTConfig(width=64, layers=2))
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        return list(train_module.train(job))


def compare_in_processes(folder: Path) -> Compare:
    """The command itself, as users start it."""

    def compare(strategy: str = "auto", devices: int = 1) -> dict[str, Any]:
        out = folder / f"{strategy}-{devices}"
        command = [sys.executable, "-m", "precision_lab.cli", "compare", "--accelerator", "cpu"]
        command += ["--modes", ",".join(MODES), "--steps", str(STEPS), "--out", str(out)]
        command += ["--strategy", strategy, "--devices", str(devices)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        finished = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
        rows = {row["mode"]: row for row in json.loads((out / "compare.json").read_text())["modes"]}
        assert finished.returncode == int(any(row["status"] == "failed" for row in rows.values()))
        return rows

    return compare


FORKED = "forked"
STARTED = pytest.param("started", marks=[pytest.mark.full, pytest.mark.slow_start])


@pytest.fixture(scope="module", params=[FORKED, STARTED])
def compare(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compare:
    forked = request.param == "forked"
    return compare_in_ranks if forked else compare_in_processes(tmp_path_factory.mktemp("compare"))


@pytest.fixture(scope="module")
def alone(compare: Compare) -> dict[str, Any]:
    rows = compare()
    assert {row["status"] for row in rows.values()} == {"done"}
    return rows


# two processes that import DeepSpeed
@pytest.mark.parametrize("strategy", [pytest.param("deepspeed", marks=pytest.mark.slow_start), "fsdp"])
def test_two_processes_train_as_one_device_does(strategy: str, compare: Compare, alone: dict[str, Any]) -> None:
    rows = compare(strategy, 2)
    assert list(rows) == MODES
    for mode, row in rows.items():
        if mode == "64-true" and strategy == "deepspeed":
            assert row["status"] == "failed" and "has no float64" in row["reason"]
            continue
        assert row["status"] == "done", row["reason"]
        assert len(row["losses"]) == STEPS
        assert curve_distance(row["losses"], alone[mode]["losses"]) <= loss_bound(mode, STEPS)
        assert row["held_out_loss"] == pytest.approx(alone[mode]["held_out_loss"], rel=1e-2)
        assert 0 < row["optimizer_bytes"] < 0.6 * alone[mode]["optimizer_bytes"]  # a half of it in each process
