"""The support table: how well this machine runs each mode, one row per mode and kind of device.

Core's rows are about its own modes, and follow from `hardware.FORMATS`: how well each kind of device computes in each
dtype, and why. Packages add theirs through the entry-point group `precision.support`, whose
functions take nothing and return an iterable of `SupportRow`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from precision_core.hardware import FORMATS, LEVELS, Level, by_dtypes
from precision_core.policy.policy import MODES
from precision_core.support import discovery


@dataclass(frozen=True)
class SupportRow:
    """How well this machine runs one mode on one kind of device, and why.

    `strategy` is a strategy's name; None: one device, and every strategy without a row of its own.

    Raises:
        ValueError: an unknown level, or a strategy that is one device.
    """

    mode: str
    device: str
    level: Level
    reason: str
    strategy: str | None = None

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"{self}: level must be one of {', '.join(LEVELS)}")
        if self.strategy in ("auto", "single_device"):
            raise ValueError(f"{self}: for one device pass strategy=None")


@dataclass(frozen=True)
class Table:
    """All rows that could be read, and the errors of those that could not, naming the package."""

    rows: list[SupportRow]
    problems: list[str]


def read_table(devices: Iterable[str] = tuple(FORMATS)) -> Table:
    """Returns core's rows for these kinds of devices, then those of each installed package."""
    table = Table([], [])
    for device_type in devices:
        try:
            table.rows.extend(
                SupportRow(mode, device_type, *by_dtypes(policy, device_type)) for mode, policy in MODES.items()
            )
        except Exception as error:  # a driver raises anything
            table.problems.append(f"{device_type}: {type(error).__name__}: {error}")
    for package in discovery.names(discovery.SUPPORT):
        try:
            table.rows.extend(_checked(discovery.load(discovery.SUPPORT, package)()))
        except (ImportError, ValueError) as error:  # these name the package, or the row
            table.problems.append(_naming(package, str(error)))
        except Exception as error:
            table.problems.append(_naming(package, f"{type(error).__name__}: {error}"))
    return table


def _checked(rows: Iterable[object]) -> list[SupportRow]:
    listed = list(rows)
    invalid = [row for row in listed if not isinstance(row, SupportRow)]
    if invalid:
        raise TypeError(f"expected rows of the support table, got {invalid[0]!r}")
    return [row for row in listed if isinstance(row, SupportRow)]


def _naming(package: str, text: str) -> str:
    start = f'support "{package}"'
    return text if text.startswith(start) else f"{start}: {text}"
