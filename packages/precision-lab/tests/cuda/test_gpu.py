"""`precision compare` on a GPU: what its figures are there. Nobody has run these tests yet."""

import json
import subprocess
import sys
import warnings

import pytest
import torch

from precision_core.testing import needs, run_in_ranks
from precision_lab.memory import PeakMemory
from precision_lab.train import Job, train

pytestmark = [needs("cuda"), pytest.mark.slow_start]

MIB = 2**20
MODES = ("64-true", "32-true", "bf16-mixed", "bf16-true", "16-mixed")


def test_peak_memory_is_what_tensors_took_after_its_construction():
    device = torch.device("cuda", 0)
    before = torch.ones(50 * MIB, device=device)  # 200 MiB that do not count
    memory = PeakMemory(device)
    taken = torch.ones(25 * MIB, device=device)
    del taken
    assert memory.read() == 100 * MIB
    assert before.sum() > 0


PARENT = """
import sys
import torch
from precision_lab.rows import ask_for_rows
rows = ask_for_rows(["bf16-mixed", "16-mixed"], "cuda", named=True, run_slow=True, strategy="auto", devices=1)
assert [row.reason for row in rows] == ["", ""], rows
assert not torch.cuda.is_initialized()
"""


def test_the_parent_makes_no_context():
    finished = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The records of the same command twice."""
    records = []
    for n in range(2):
        out = tmp_path_factory.mktemp(f"run{n}")
        command = [sys.executable, "-m", "precision_lab.cli", "compare", "--accelerator", "cuda", "--steps", "20"]
        finished = subprocess.run(
            [*command, "--modes", ",".join(MODES), "--out", str(out)], capture_output=True, text=True
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        assert "deterministic kernels" in finished.stdout
        records.append({row["mode"]: row for row in json.loads((out / "compare.json").read_text())["modes"]})
    return records


def test_every_mode_trains_and_the_same_twice(runs):
    first, second = runs
    for mode in MODES:
        assert first[mode]["losses"] == second[mode]["losses"]
        assert first[mode]["losses"][-1] < first[mode]["losses"][0]
        assert first[mode]["peak_memory_bytes"] > first[mode]["parameter_bytes"]
    assert first["32-true"]["drift"] < 1e-3
    assert first["bf16-true"]["parameter_bytes"] * 2 == first["32-true"]["parameter_bytes"]


def test_a_gpus_losses_are_a_cpus(runs):
    (events,) = run_in_ranks(1, lambda: list(train(Job("64-true", 20, 0, "cpu"))))
    losses = [event["loss"] for event in events if "loss" in event]
    assert runs[0]["64-true"]["losses"] == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("mode", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_step_waits_for_its_loss_and_its_batch_alone(mode):
    """The loss is read, and the batch's positions come from the CPU; of 16-mixed, once in 100 steps, its scale."""
    waits = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for event in train(Job(mode, 12, 0, "cuda")):
                if "step" in event:
                    waits.append(sum("called a synchronizing" in str(each.message) for each in caught))
                    caught.clear()
                torch.cuda.set_sync_debug_mode("warn" if event.get("step", 12) < 12 else "default")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 12 and max(waits[2:]) <= 2
