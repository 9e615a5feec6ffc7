"""The root README: its two blocks train the same values, its install command installs, its links and commands hold."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from precision_core import MODES
from precision_core.testing import run_in_ranks

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BEFORE, AFTER = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def trained(block: str, precision: str = "16-mixed", size: float = 0.1) -> dict[str, Tensor]:
    """Returns the parameters, and the learning rate, after a block on the CPU, with the same start for each.

    Targets of size 1 make a gradient overflow at the first loss scale, those of size 0.1 do not.
    """
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 8), size * torch.randn(64, 2))
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    names: dict[str, Any] = {"torch": torch, "device": "cpu", "criterion": nn.MSELoss(), "model": model}
    names |= {"loader": DataLoader(data, 8), "optimizer": optimizer}
    names["scheduler"] = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    exec(block.replace('precision="16-mixed"', f'accelerator="cpu", precision="{precision}"'), names)
    values = {name: copy.deepcopy(value) for name, value in model.state_dict().items()}
    return values | {"lr": torch.tensor(optimizer.param_groups[0]["lr"])}


def test_before_and_after_train_the_same_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before, after = trained(BEFORE), trained(AFTER)
    assert set(torch.load("last.ckpt", weights_only=True)) >= {"model", "optimizer", "scheduler", "loader"}
    assert before.keys() == after.keys()
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-7)  # norms are added up in another order
    with pytest.raises(AssertionError):  # which would see another format
        torch.testing.assert_close(trained(AFTER, "bf16-mixed"), before, rtol=1e-6, atol=1e-7)
    assert trained(AFTER, size=1.0)["lr"] > trained(BEFORE, size=1.0)["lr"]  # a skipped step ages the rate there alone


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(targets) > 15
    assert [target for target in targets if not (ROOT / target).exists()] == []
    assert not re.search(r"https?://", README)  # what a reader needs is in the checkout


def test_it_is_read_in_two_minutes_and_names_the_commands() -> None:
    assert len(README.splitlines()) < 120
    for command in ('pip install "nox[uv]" && nox -s compare\n', 'pip install "nox[uv]" && nox\n'):
        assert f"    {command}" in README
    for example in sorted(ROOT.glob("examples/*.py")):
        assert f"(examples/{example.name})" in README


def test_the_picture_is_small_and_shows_every_mode_by_its_figures() -> None:
    path = ROOT / "benchmarks/compare.svg"
    picture = ElementTree.parse(path).getroot()
    words = [element.text or "" for element in picture.iter() if element.tag.endswith("}text")]
    assert path.stat().st_size < 100_000
    assert {"32-true", "bf16-mixed", "bf16-true"} <= set(words)
    assert not any("ms" in word.split() for word in words)  # times do not hold on a busy machine
    bars = [each for each in picture.iter() if each.tag.endswith("}rect") and each.get("height") == "20"]
    modes = sum(word in MODES for word in words)
    assert len(bars) == 3 * modes >= 9  # parameters, gradients, optimizer
    assert "prefers-color-scheme: dark" in path.read_text()


@pytest.mark.full
def test_the_install_command_installs_this_commit(tmp_path: Path) -> None:
    (requirement,) = re.findall(r'pip install "(precision-core @ git\+file://[^"]+)"', README)
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    command = [sys.executable, "-m", "uv", "pip", "install", "--no-deps", "--target", str(tmp_path / "installed")]
    subprocess.run([*command, requirement.replace("$PWD", str(clone))], check=True, timeout=300)
    installed = (tmp_path / "installed/precision_core/fabric.py").read_text()
    assert installed == (clone / "packages/precision-core/src/precision_core/fabric.py").read_text()


def two_processes(folder: Path) -> tuple[int, bool]:
    os.chdir(folder)
    values = trained(AFTER.replace("Fabric(", "Fabric(devices=2, "))
    return torch.distributed.get_world_size(), all(value.isfinite().all() for value in values.values())


@pytest.mark.full
def test_the_block_runs_in_two_processes(tmp_path: Path) -> None:
    assert run_in_ranks(2, two_processes, tmp_path) == [(2, True)] * 2
