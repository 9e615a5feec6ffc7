"""The diffs of the migration pages: both sides run on tiny data, and train alike."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

MIGRATE = Path(__file__).parents[2] / "docs" / "migrate"
PEERS = {
    "torch_amp": ("torch", 0.0, 1e-7),
    "lightning": ("lightning_fabric", 0.0, 0.0),
    "accelerate": ("accelerate", 0.0, 0.0),
    "trainer": ("transformers", 1e-5, 1e-6),  # it sums the batch in another order
}
"""Folder -> the package that the left side imports, and how far losses (relative) and weights may lie apart."""
Result = tuple[list[float], list[torch.Tensor]]

IN_A_PROCESS = """
import json, runpy, sys, torch
torch.set_num_threads(1)
losses, weights = runpy.run_path(sys.argv[1])["train"]()
print(json.dumps([losses, [weight.tolist() for weight in weights]]))
"""


def after(name: str) -> Result:
    state = torch.get_rng_state()
    try:
        return runpy.run_path(str(MIGRATE / name / "after.py"))["train"]()
    finally:
        torch.set_rng_state(state)


def before(name: str) -> Result:
    """In a process of its own: peers keep process-wide state."""
    command = [sys.executable, "-W", "ignore", "-c", IN_A_PROCESS, str(MIGRATE / name / "before.py")]
    quiet = os.environ | {"ACCELERATE_LOG_LEVEL": "error", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=quiet)
    assert done.returncode == 0, done.stderr
    losses, weights = json.loads(done.stdout.splitlines()[-1])
    return losses, [torch.tensor(weight) for weight in weights]


@pytest.mark.parametrize(
    "name",
    [
        "torch_amp",
        pytest.param("lightning", marks=pytest.mark.full),
        pytest.param("accelerate", marks=pytest.mark.full),
        pytest.param("trainer", marks=pytest.mark.full),
    ],
)
def test_both_sides_train_alike(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, of_losses, of_weights = PEERS[name]
    if not importlib.util.find_spec(package):
        pytest.skip(f"{package} is not installed here")
    monkeypatch.chdir(tmp_path)
    if package == "torch":
        (losses, weights) = runpy.run_path(str(MIGRATE / name / "before.py"))["train"]()
    else:
        losses, weights = before(name)
    ours, of_ours = after(name)

    assert ours[-1] < 0.8 * ours[0]  # it learns
    assert ours == pytest.approx(losses, rel=of_losses, abs=0.0) and len(ours) == 10
    for expected, got in zip(weights, of_ours, strict=True):
        torch.testing.assert_close(got, expected, rtol=0.0, atol=of_weights)


@pytest.mark.parametrize("name", [*PEERS, "apex"])
def test_the_right_side_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    losses, weights = after(name)
    assert losses[-1] < 0.8 * losses[0] and all(weight.isfinite().all() for weight in weights)
    assert (tmp_path / "last.ckpt").exists()


def test_apex_is_gone_but_its_side_is_python() -> None:
    tree = ast.parse((MIGRATE / "apex" / "before.py").read_text())
    assert any(isinstance(node, ast.ImportFrom) and node.module == "apex" for node in ast.walk(tree))


def test_each_folder_has_a_page_that_shows_it() -> None:
    folders = sorted(path.name for path in MIGRATE.iterdir() if path.is_dir() and (path / "before.py").exists())
    shown = [line for page in MIGRATE.glob("*.md") for line in page.read_text().splitlines() if "<!-- diff:" in line]
    assert sorted(shown) == sorted(f"<!-- diff: docs/migrate/{name} -->" for name in folders)
    assert folders == sorted([*PEERS, "apex"])
