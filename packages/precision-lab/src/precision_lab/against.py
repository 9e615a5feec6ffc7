"""`--against old.json`: what changed since an older record of `precision compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from precision_lab.shown import human_bytes

_FIGURES = {
    "held-out": ("held_out_loss", "{:.4f}".format),
    "x 32-true": ("time_ratio", "{:.2f}".format),
    "peak": ("peak_memory_bytes", human_bytes),
}


def read_record(path: str) -> dict[str, Any]:
    """Returns the record of an older run.

    Raises:
        ValueError: it is not there, or no record of `precision compare`.
    """
    try:
        record = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not isinstance(record, dict) or not {"modes", "steps", "seed", "version"} <= record.keys():
        raise ValueError(f"{path} is no compare.json of `precision compare`")
    return record


def changes(record: dict[str, Any], old: dict[str, Any]) -> list[list[str]]:
    """Returns for each mode that both have: its name, then "old -> new" of each figure."""
    before = {row["mode"]: row for row in old["modes"]}
    rows = []
    for row in record["modes"]:
        if row["mode"] in before:
            rows.append([row["mode"], *(_change(before[row["mode"]], row, *each) for each in _FIGURES.values())])
    return rows


def _change(old: dict[str, Any], new: dict[str, Any], figure: str, text: Any) -> str:
    was, now = (text(row[figure]) if row.get(figure) is not None else row["status"] for row in (old, new))
    return str(now) if was == now else f"{was} -> {now}"


def differences(record: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """Returns what makes the two hard to compare: other steps, seed, task, device."""
    pairs = {name: (old.get(name), record.get(name)) for name in ("steps", "seed", "strategy", "task", "size")}
    for name in ("device_name", "threads", "torch"):
        pairs[name] = old["environment"].get(name), record["environment"].get(name)
    return [f"{name}: {was} -> {now}" for name, (was, now) in pairs.items() if was != now and was is not None]


def print_against(record: dict[str, Any], old: dict[str, Any], console: Console) -> None:
    """Prints old -> new of each mode that both records have, and what else differs."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), title_justify="left")
    for name in ("mode", *_FIGURES):
        table.add_column(name, overflow="fold")
    for row in changes(record, old):
        table.add_row(*map(escape, row))
    console.print()
    console.print("against the older record, old -> new")
    console.print(table)
    for line in differences(record, old):
        console.print(f"  {line}", markup=False)
