"""Report: a frozen value that prints as a table."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from precision_core import DoublePrecision, Fabric, HalfPrecision, Precision, Report
from precision_core.precision.model.report import Item, module_bytes


def test_the_table() -> None:
    report = Report(
        "bf16-true",
        converted=(Item("a", "float32 -> bfloat16"), Item("long.name", "float32 -> bfloat16")),
        skipped=(Item("norm", "kept in float32"),),
        notes=("a note",),
        bytes_before=3 * 2**20,
        bytes_after=1536,
    )
    assert str(report).splitlines() == [
        "bf16-true: 2 converted, 1 skipped, 3.0 MiB -> 1.5 KiB",
        "  converted  a          float32 -> bfloat16",
        "  converted  long.name  float32 -> bfloat16",
        "  skipped    norm  kept in float32",
        "  note       a note",
    ]


def test_long_tables_are_cut_and_empty_ones_are_one_line() -> None:
    lines = str(Report("32-true", converted=tuple(Item(f"layer{i}", "x") for i in range(25)))).splitlines()
    assert lines[0] == "32-true: 25 converted, 0 skipped, 0.0 KiB -> 0.0 KiB"
    assert len(lines) == 22 and lines[20] == "  converted  layer19  x" and lines[21] == "  converted  ... and 5 more"
    assert str(Report("32-true")) == "32-true: 0 converted, 0 skipped, 0.0 KiB -> 0.0 KiB"


def test_a_report_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Report("32-true").mode = "64-true"  # type: ignore[misc]
    assert hash(Report("32-true")) == hash(Report("32-true"))


def test_bytes_count_shared_tensors_once_and_every_dtype() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3, bias=False), nn.LazyLinear(2, bias=False))
    module.register_buffer("table", torch.zeros(7, dtype=torch.int64))
    assert module_bytes(module) == (15 + 5 + 15) * 4 + 7 * 8
    module[1].weight = nn.Parameter(module[0].weight.detach().T)
    module[0].half()
    assert module_bytes(module) == (15 + 5) * 2 + 15 * 4 + 7 * 8
    shared = nn.Linear(3, 3, bias=False)
    assert module_bytes(nn.Sequential(shared, shared)) == 9 * 4


@pytest.mark.parametrize(
    ("precision", "arrow"),
    [
        (Precision(), None),
        (DoublePrecision(), "float32 -> float64"),
        (HalfPrecision("bf16-true"), "float32 -> bfloat16"),
        (HalfPrecision("16-true"), "float32 -> float16"),
    ],
    ids=["32-true", "64-true", "bf16-true", "16-true"],
)
def test_what_conversions_leave(precision: Precision, arrow: str | None) -> None:
    assert precision.report.converted == ()
    module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5, track_running_stats=False))
    module.register_buffer("scale", torch.ones(1))
    module.register_buffer("count", torch.zeros(1, dtype=torch.int64))
    precision.convert_module(module)
    names = ("0.weight", "0.bias", "1.weight", "1.bias", "scale")
    assert precision.report.mode == str(precision.policy)
    assert precision.report.converted == (() if arrow is None else tuple(Item(name, arrow) for name in names))
    assert precision.report.skipped == ()
    assert precision.report.bytes_before == 31 * 4 + 8
    assert precision.report.bytes_after == 31 * precision.policy.params.itemsize + 8


def test_pure_half_says_that_small_updates_are_lost_and_it_is_true() -> None:
    for mode, dtype, (narrow, wide) in (
        ("bf16-true", torch.bfloat16, (1 / 256, 1 / 128)),
        ("16-true", torch.float16, (1 / 2048, 1 / 1024)),
    ):
        precision = HalfPrecision(mode)
        module = precision.convert_module(nn.Linear(1, 1))
        (note,) = precision.report.notes
        name = str(dtype).removeprefix("torch.")
        assert note.startswith(
            f"pure {name} loses updates below half its spacing (1/{2 / narrow:.0f} to 1/{2 / wide:.0f}"
        )
        assert note in str(precision.report)
        for value, spacing in ((1.0, wide), (2.0 - wide, narrow)):
            module.weight.data.fill_(value)
            assert (module.weight + value * spacing * 0.49).item() == value
            assert (module.weight + value * spacing * 0.51).item() > value


LINES = {
    "64-true": "parameters and computation are float64",
    "32-true": "parameters and computation are float32",
    "bf16-mixed": "parameters are float32, layers compute in bfloat16 under autocast",
    "16-mixed": "parameters are float32, layers compute in float16 under autocast",
    "bf16-true; 1: 32-true": "parameters and computation are bfloat16, but in 1",
}


@pytest.mark.parametrize("mode", LINES)
def test_before_setup_it_says_what_will_be_computed_in_what(mode: str) -> None:
    precision = Fabric(accelerator="cpu", precision=mode).precision_plugin
    assert str(precision.report) == f"{mode}: {LINES[mode]}; no model is set up yet"


def test_a_model_that_needs_no_cast_is_not_called_unconverted() -> None:
    host = Fabric(accelerator="cpu", precision="bf16-mixed")
    host.setup(nn.Linear(2, 2))
    assert str(host.precision_plugin.report).splitlines()[:2] == [
        f"bf16-mixed: {LINES['bf16-mixed']}",
        "  no parameter or buffer had to be cast, 0.0 KiB",
    ]
    host = Fabric(accelerator="cpu", precision="bf16-mixed", upcast=True)
    host.setup(nn.Linear(2, 2).double())
    lines = str(host.precision_plugin.report).splitlines()
    assert lines[1] == "  2 converted, 0 skipped, 0.0 KiB -> 0.0 KiB"
    assert lines[2].split() == ["converted", "weight", "float64", "->", "float32"]


def test_a_plugin_of_another_mode_says_what_is_around_its_layers() -> None:
    class Quantised(HalfPrecision):
        mode = "nf4"

    assert str(Quantised("bf16-true").report) == (
        "nf4: around its own layers, parameters and computation are bfloat16; no model is set up yet"
    )
