"""Every Python block of the site runs as it stands: those of a page one after another, with the names of those before.

The READMEs, which are pages of the site too, are run by their packages' own tests.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from precision_core.testing import run_in_ranks

DOCS = Path(__file__).parents[2] / "docs"
HEAVY = {"recipes/qlora.md": ("precision_bnb", "precision_fsdp", "peft", "transformers")}
"""Pages whose blocks import a vendor for seconds, and what they need."""
PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
"""What peft 0.21 does with transformers 5.24, and we have no hand in."""
NEEDS = {"recipes/fp8.md": "precision_te"}


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def pages() -> list[Any]:
    names = [page.relative_to(DOCS).as_posix() for page in sorted(DOCS.rglob("*.md")) if blocks(page)]
    return [pytest.param(name, marks=[pytest.mark.full, PEFT] if name in HEAVY else []) for name in names]


@pytest.mark.parametrize("name", pages())
def test_the_blocks_of_a_page_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [*HEAVY.get(name, ()), *filter(None, [NEEDS.get(name)])]:
        pytest.importorskip(module, reason=f"{module} is not installed here")
    monkeypatch.chdir(tmp_path)
    code = blocks(DOCS / name)
    if any("fabric.launch()" in block for block in code):
        run_in_ranks(2, run, name, code)
    else:
        run(name, code)


def run(name: str, code: list[str]) -> None:
    state = torch.get_rng_state()
    names: dict[str, Any] = {}
    try:
        for block in code:
            exec(compile(block, name, "exec"), names)
    finally:
        torch.set_rng_state(state)


def test_what_is_said_to_be_heavy_is_there() -> None:
    assert all(blocks(DOCS / name) for name in (*HEAVY, *NEEDS))
