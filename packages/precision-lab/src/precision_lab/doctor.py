"""`precision doctor`: what this machine runs, what is installed, and what is wrong with it.

Nothing is trained, and no vendor library but torch is imported: packages are read from their metadata, and only their
rows of the support table are loaded. Whatever raises is a problem in the findings; the rest is still found.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from precision_core import SupportRow
from precision_core.support import PLUGINS, STRATEGIES, is_core_mode, names, read_table
from precision_lab.installed import (
    Missing,
    Package,
    duplicate_names,
    find_distributions,
    find_missing,
    find_packages,
    find_vendors,
    unmet_requirements,
)
from precision_lab.machine import Device, Machine, describe_machine, find_devices


@dataclass(frozen=True)
class Findings:
    """Everything that `precision doctor` reports; its fields are those of the JSON object."""

    machine: Machine
    devices: list[Device]
    packages: list[Package]
    vendors: dict[str, str | None]
    """Library -> version; None: it is not installed."""
    missing: list[Missing]
    support: list[SupportRow]
    """One row for each mode, device that is here, and strategy that has a row of its own."""
    unrated: dict[str, list[str]]
    """Mode -> devices without a row: `supports` loads the plugin and judges it by its dtypes."""
    problems: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Returns everything as plain values for JSON."""
        return {"version": 1} | asdict(self)


def examine() -> Findings:
    """Examines this machine and what is installed on it; what fails meanwhile is among the problems."""
    devices, installed = find_devices(), find_distributions()
    packages = find_packages(installed)
    problems = [f"{device.type}: {device.error}" for device in devices if device.error]
    problems += [*duplicate_names(), *unmet_requirements(packages, installed)]
    here = [device.type for device in devices if device.here or device.type == "xla"]
    table = read_table(here)
    problems += table.problems
    return Findings(
        machine=describe_machine(),
        devices=devices,
        packages=packages,
        vendors=find_vendors(installed),
        missing=find_missing(),
        support=_rows_that_count(table.rows, here),
        unrated=_unrated(table.rows, here),
        problems=list(dict.fromkeys(problems)),  # a name that is claimed twice cannot be loaded either
    )


def _rows_that_count(rows: list[SupportRow], devices: list[str]) -> list[SupportRow]:
    """Returns the rows that `supports` can answer with here, by device, one device first, then by strategy."""
    modes, strategies = names(PLUGINS), [None, *names(STRATEGIES)]
    counting = {
        (row.mode, row.device, row.strategy): row  # of two for the same, `supports` takes the last
        for row in rows
        if row.device in devices and row.strategy in strategies and (is_core_mode(row.mode) or row.mode in modes)
    }
    return sorted(counting.values(), key=lambda row: (devices.index(row.device), strategies.index(row.strategy)))


def _unrated(rows: list[SupportRow], devices: list[str]) -> dict[str, list[str]]:
    rated = {(row.mode, row.device) for row in rows if row.strategy is None}
    unrated = {mode: [each for each in devices if (mode, each) not in rated] for mode in names(PLUGINS)}
    return {mode: without for mode, without in unrated.items() if without}
