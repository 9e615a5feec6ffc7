"""`precision compare` under the strategies that packages bring: the same training, or a row with the reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from precision_core.testing import curve_distance, loss_bound

STEPS = 4
MODES = "64-true,32-true,bf16-mixed"


def compare(folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Returns the exit code, and each mode's row of the record."""
    command = [sys.executable, "-m", "precision_lab.cli", "compare", "--accelerator", "cpu", "--modes", MODES]
    command += ["--steps", str(STEPS), "--out", str(folder), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    record = json.loads((folder / "compare.json").read_text())
    return finished.returncode, {row["mode"]: row for row in record["modes"]}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    code, rows = compare(tmp_path_factory.mktemp("alone"))
    assert code == 0
    return rows


@pytest.mark.parametrize("strategy", ["deepspeed", "fsdp"])
def test_two_processes_train_as_one_device_does(strategy: str, tmp_path: Path, alone: dict[str, Any]) -> None:
    code, rows = compare(tmp_path, "--strategy", strategy, "--devices", "2")
    refused = strategy == "deepspeed"  # it has no float64
    assert code == int(refused)
    for mode, row in rows.items():
        if mode == "64-true" and refused:
            assert row["status"] == "failed" and "has no float64" in row["reason"]
            continue
        assert row["status"] == "done", row["reason"]
        assert len(row["losses"]) == STEPS
        assert curve_distance(row["losses"], alone[mode]["losses"]) <= loss_bound(mode, STEPS)
        assert row["held_out_loss"] == pytest.approx(alone[mode]["held_out_loss"], rel=1e-2)
        assert 0 < row["optimizer_bytes"] < 0.6 * alone[mode]["optimizer_bytes"]  # a half of it in each process
