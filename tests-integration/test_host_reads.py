"""The table of host reads in precision-core's README is what ten steps read."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
COLUMNS = ("one device", "ddp", "fsdp", "deepspeed 0", "deepspeed 1", "deepspeed 2", "deepspeed 3")


@pytest.fixture
def script() -> Any:
    spec = importlib.util.spec_from_file_location("count_host_reads", BENCHMARKS / "count_host_reads.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_has_each_mode_and_strategy(script: Any) -> None:
    assert COLUMNS == script.COLUMNS
    assert set(script.in_readme()) == {(mode, column) for mode in script.ROWS for column in COLUMNS}
    assert {cell for (_, column), cell in script.in_readme().items() if "deepspeed" not in column} == {"0"}


@pytest.mark.full
@pytest.mark.parametrize("column", COLUMNS)
def test_the_readme_says_what_ten_steps_read(column: str, script: Any) -> None:
    readme = {mode: cell for (mode, at), cell in script.in_readme().items() if at == column}
    for vendor in ("bitsandbytes", "deepspeed"):  # once, before ranks are forked
        importlib.import_module(vendor)
    assert script.counts(column) == readme
