"""The README's Python blocks run as they stand, each alone: what a reader pastes into a file runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from precision_core.testing import run_in_ranks

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[-1][:40])
def test_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if "fabric.launch()" in block:
        run_in_ranks(2, run, block)
    else:
        run(block)


def run(block: str) -> None:
    names: dict[str, Any] = {}
    state = torch.get_rng_state()
    try:
        exec(compile(block, str(README), "exec"), names)
    finally:
        torch.set_rng_state(state)
    for param in names["model"].parameters() if "model" in names else ():
        assert torch.isfinite(param).all()


def test_there_are_blocks() -> None:
    assert len(BLOCKS) == 9
