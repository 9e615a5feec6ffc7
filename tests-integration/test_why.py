"""Injected faults are named to the operation and the module, and mended: benchmarks/bench_why.py, a part of it here."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("bench_why", BENCHMARKS / "bench_why.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module


@pytest.mark.parametrize(
    "mode, title, place",
    [
        ("16-mixed", "MLP", 4),
        pytest.param("16-true", "transformer", 5, marks=pytest.mark.full),
        pytest.param("bf16-mixed", "conv", 2, marks=pytest.mark.full),
        pytest.param("32-true", "transformer", 3, marks=pytest.mark.full),
    ],
)
def test_a_fault_of_each_kind(bench: Any, mode: str, title: str, place: int) -> None:
    missed, bites = [], 0
    for fault in bench.FAULTS:
        seen = bench.one(mode, title, fault, place, False)
        bites += seen.get("bite", 0)
        if seen and not (seen["op"] and seen["module"] and seen["mended"]):
            missed.append((fault, seen))
    assert not missed and bites >= 10


@pytest.mark.parametrize("mode", ["16-mixed", pytest.param("16-true", marks=pytest.mark.full)])
def test_right_steps_give_nothing(bench: Any, mode: str) -> None:
    for title in bench.MODELS:
        assert bench.right(mode, title, 0).kind == "nothing"


@pytest.mark.full
@pytest.mark.slow_start  # all 1,500 faults: minutes
def test_all_faults(bench: Any) -> None:
    count: Counter[str] = Counter()
    for mode in bench.MODES:
        for title in bench.MODELS:
            for fault in bench.FAULTS:
                for place in range(bench.PLACES):
                    count.update(bench.one(mode, title, fault, place, False))
    assert count["bite"] > 1400
    assert count["op"] >= 0.95 * count["bite"]
    assert count["module"] >= 0.99 * count["bite"]
    assert count["mended"] >= 0.8 * count["bite"]
    assert count["fabric"] >= 0.8 * count["exceptions"]
