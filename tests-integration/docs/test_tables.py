"""The site's tables say what the code says."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / "ci" / "docs_tables.py"))


@pytest.mark.parametrize("name", SCRIPT["TABLES"])
def test_a_table_is_current(name: str) -> None:
    for package in ("precision_deepspeed", "precision_fsdp", "precision_bnb", "precision_te", "precision_kahan"):
        pytest.importorskip(package, reason=f"{package} is not installed here")
    assert (SCRIPT["FOLDER"] / name).read_text() == SCRIPT["TABLES"][name](), "run: python ci/docs_tables.py"
