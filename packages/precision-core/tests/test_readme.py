"""The README's Python blocks run as they stand."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from precision_core import Fabric
from precision_core.testing import run_in_ranks

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def names_that_the_text_takes_as_known() -> dict[str, Any]:
    model = nn.Sequential(OrderedDict(body=nn.Linear(4, 4), lm_head=nn.Linear(4, 2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric = Fabric(accelerator="cpu")
    return {
        "Fabric": Fabric,
        "fabric": fabric,
        "plugin": fabric.precision_plugin,
        "model": model,
        "quantise": lambda layer: layer,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1),
        "criterion": nn.MSELoss(),
        "loader": [(torch.randn(3, 4), torch.randn(3, 2))] * 2,
    }


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[-1][:40])
def test_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if "fabric.launch()" in block:
        run_in_ranks(2, run, block)
    else:
        run(block)


def run(block: str) -> None:
    names = names_that_the_text_takes_as_known()
    exec(compile(block, str(README), "exec"), names)
    for param in names["model"].parameters():
        assert torch.isfinite(param).all()


def test_there_are_blocks() -> None:
    assert len(BLOCKS) == 11
