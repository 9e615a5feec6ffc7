"""Benchmarks that are meant for a GPU run on a CPU, with a tiny model; what they count is what is there."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = [
    "--accelerator",
    "cpu",
    "--parameters",
    "5e4",
    "--context",
    "16",
    "--batch",
    "2",
    "--steps",
    "3",
    "--warmup",
    "0",
]


@pytest.fixture
def formats(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("bench_gpu_formats", BENCHMARKS / "bench_gpu_formats.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("_measure", None)


@pytest.mark.slow_start
def test_each_mode_trains_and_prints_its_figures(
    formats: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *TINY])
    formats.main()
    lines = capsys.readouterr().out.splitlines()
    figures = [json.loads(line) for line in lines if line.startswith("{")]
    assert [each["mode"] for each in figures] == ["bf16-mixed", "bf16-true", "16-mixed", "32-true"]
    for each in figures:
        assert each["tokens a second"] > 0 and each["MFU"] is each["peak GiB"] is None
        assert each["last loss"] < each["first loss"] == pytest.approx(5.7, abs=0.5)  # ln 256 is 5.5
    table = [line.split() for line in lines[lines.index("") :]]
    assert [line[0] for line in table[3:]] == [each["mode"] for each in figures]
    assert [line[-1] for line in table[3:]] == [str(each["last loss"]) for each in figures]


@pytest.mark.parametrize("size", [(32, 1), (64, 2), (256, 4)])
def test_parameters_are_counted_right(formats: Any, size: tuple[int, int]) -> None:
    model = formats.GPT(*size, 100, 16)
    assert formats.count(*size, 100, 16) == sum(param.numel() for param in model.parameters())


def test_the_largest_model_that_fits_is_chosen(formats: Any) -> None:
    assert formats.size_for(1.3e9, 32768, 1024) == (2048, 24)
    assert formats.size_for(4e8, 32768, 1024) == (1024, 24)
    assert formats.size_for(1.0, 32768, 1024) == (32, 1)
    assert formats.parameters_that_fit(torch.device("cpu")) == 2e6
