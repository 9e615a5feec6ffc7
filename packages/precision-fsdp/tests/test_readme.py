"""The README's examples, on two CPU ranks."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from precision_core.testing import run_in_ranks

README = (Path(__file__).parents[1] / "README.md").read_text()
FABRIC, OWN_DTYPES, BY_HAND, ON_META, FILLED = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(folder: Path, *blocks: str) -> dict[str, Any]:
    os.chdir(folder)
    names: dict[str, Any] = {"__name__": "pasted"}
    for block in blocks:
        exec(block, names)
    return names


def with_fabric(folder: Path) -> None:
    names = run(folder, FABRIC, ON_META, FILLED)
    assert names["fabric"].world_size == 2 and (folder / "last").is_dir()
    x = torch.ones(2, 64)
    with torch.no_grad():
        assert torch.equal(names["pretrained"](x), names["model"](x))  # the file's values
        assert names["large"](x).isfinite().all()


def with_own_dtypes(folder: Path) -> None:
    fabric = run(folder, FABRIC, OWN_DTYPES)["fabric"]
    model = fabric.setup(torch.nn.Linear(4, 4))
    assert "reduce in bfloat16 as mixed_precision says, not in float32" in str(fabric.precision_plugin.report)
    assert model.weight.dtype is torch.float32


def by_hand(folder: Path) -> None:
    precision = run(folder, BY_HAND)["precision"]
    assert (precision.mode, precision.steps) == ("bf16-mixed", 3)


def test_the_examples_run(tmp_path: Path) -> None:
    for check in (with_fabric, with_own_dtypes, by_hand):
        run_in_ranks(2, check, tmp_path)
