"""`precision doctor`: what this machine runs, what is installed, and what is wrong with it.

Nothing is trained, and no vendor library but torch is imported: packages are read from their metadata, and only their
rows of the support table are loaded. Whatever raises is a problem in the findings; the rest is still found.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from precision_core import MODES, SupportRow
from precision_core.discovery import PLUGINS, STRATEGIES, SUPPORT, load, names
from precision_core.formats import by_dtypes
from precision_core.resolve import is_core_mode
from precision_lab.installed import (
    Missing,
    Package,
    claimed_twice,
    find_distributions,
    find_missing,
    find_packages,
    find_vendors,
    unmet_requirements,
)
from precision_lab.machine import Device, Machine, describe_machine, find_devices


@dataclass(frozen=True)
class Findings:
    """Everything that `precision doctor` says; field for field the JSON object."""

    machine: Machine
    devices: list[Device]
    packages: list[Package]
    vendors: dict[str, str | None]
    """Library -> version; None: it is not installed."""
    missing: list[Missing]
    support: list[SupportRow]
    """One row for each mode, device that is here, and strategy that has a row of its own."""
    unrated: dict[str, list[str]]
    """Mode -> devices of which no row speaks: `supports` loads its plugin and judges it by its dtypes."""
    problems: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Returns everything as plain values for JSON."""
        return {"version": 1} | asdict(self)


def examine() -> Findings:
    """Returns what there is to say of this machine and what is installed on it."""
    devices, installed = find_devices(), find_distributions()
    packages = find_packages(installed)
    problems = [f"{device.type}: {device.error}" for device in devices if device.error]
    problems += [*claimed_twice(), *unmet_requirements(packages, installed)]
    here = [device.type for device in devices if device.here or device.type == "xla"]
    rows = [*_core_rows(here, problems), *_package_rows(problems)]
    return Findings(
        machine=describe_machine(),
        devices=devices,
        packages=packages,
        vendors=find_vendors(installed),
        missing=find_missing(),
        support=_rows_that_count(rows, here),
        unrated=_unrated(rows, here),
        problems=list(dict.fromkeys(problems)),  # a name that is claimed twice cannot be loaded either
    )


def _core_rows(devices: list[str], problems: list[str]) -> list[SupportRow]:
    rows: list[SupportRow] = []
    for device in devices:
        try:
            rows += [SupportRow(mode, device, *by_dtypes(policy, device)) for mode, policy in MODES.items()]
        except Exception as error:  # a driver raises anything
            problems.append(f"{device}: {type(error).__name__}: {error}")
    return rows


def _package_rows(problems: list[str]) -> list[SupportRow]:
    rows: list[SupportRow] = []
    for package in names(SUPPORT):
        try:
            rows += _checked(load(SUPPORT, package)())
        except (ImportError, ValueError) as error:  # these say it all
            problems.append(_naming(package, str(error)))
        except Exception as error:
            problems.append(_naming(package, f"{type(error).__name__}: {error}"))
    return rows


def _checked(rows: Iterable[object]) -> list[SupportRow]:
    listed = list(rows)
    odd = [row for row in listed if not isinstance(row, SupportRow)]
    if odd:
        raise TypeError(f"expected rows of the support table, got {odd[0]!r}")
    return [row for row in listed if isinstance(row, SupportRow)]


def _naming(package: str, text: str) -> str:
    start = f'support "{package}"'
    return text if text.startswith(start) else f"{start}: {text}"


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
