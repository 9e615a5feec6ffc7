"""The support query: can this machine run that mode, how well, and why (not).

The answer comes from a table of rows. Core's speak of its own modes; packages add theirs through the entry-point group
`precision.support`, whose functions take nothing and return an iterable of `SupportRow`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from precision_core import discovery
from precision_core.devices import ACCELERATORS, is_available
from precision_core.formats import FORMATS, LEVELS, Level, by_dtypes
from precision_core.policy import MODES, Policy
from precision_core.resolve import is_core_mode, load_plugin
from precision_core.runnable import check_runnable
from precision_core.strategies import STRATEGIES, Strategy

_CORE = {discovery.PLUGINS: MODES, discovery.STRATEGIES: ("auto", *STRATEGIES)}


@dataclass(frozen=True)
class Support:
    """An answer: "native", "emulated", "slow" or "no", and the reason. True unless it is "no"."""

    level: Level
    reason: str

    def __bool__(self) -> bool:
        return self.level != "no"

    def __str__(self) -> str:
        return f"{self.level}: {self.reason}"


@dataclass(frozen=True)
class SupportRow:
    """What this machine makes of one mode on one kind of device.

    `strategy` is a strategy's name; None: one device, and every strategy that has no row of its own.
    """

    mode: str
    device: str
    level: Level
    reason: str
    strategy: str | None = None

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"{self}: level is one of {', '.join(LEVELS)}")


def supports(mode: str | int | Policy, device: str | torch.device, strategy: str | Strategy | None = None) -> Support:
    """Returns whether this machine runs `mode` on that kind of device under that strategy, how well, and why.

    Args:
        mode: any mode that `Fabric(precision=...)` takes, those of installed packages included, or a policy.
        device: a device or its type ("cuda", "cuda:1"), or an accelerator ("gpu", "tpu").
        strategy: a strategy or its name; None and "auto" are one device.

    Raises:
        ValueError: a mode, device or strategy that nobody knows. One that is known but not installed is a "no".
    """
    device_type = _device_type(device)
    name = _strategy_name(strategy)
    if name is not None and name not in STRATEGIES and discovery.find(discovery.STRATEGIES, name) is None:
        return Support("no", _known_or_raise(discovery.STRATEGIES, name))
    if device_type in FORMATS and not is_available(device_type):
        return Support("no", f"torch finds no {device_type} device here")
    if not is_core_mode(mode) and discovery.find(discovery.PLUGINS, str(mode)) is None:
        return Support("no", _known_or_raise(discovery.PLUGINS, str(mode)))
    policy = Policy.parse(mode) if is_core_mode(mode) else None  # None: a package's
    row = _row(str(policy or mode), device_type, name)
    if row is not None:
        return Support(row.level, row.reason)
    return _of_policy(policy or load_plugin(str(mode)).policy, device_type, by_core=policy is not None)


def table() -> list[SupportRow]:
    """Returns all rows: core's, then those of each installed package."""
    rows = core_rows()
    for package in discovery.names(discovery.SUPPORT):
        rows += discovery.load(discovery.SUPPORT, package)()
    return rows


def core_rows() -> list[SupportRow]:
    """Returns the rows of core's modes, one for each kind of device that torch itself drives."""
    return [
        SupportRow(mode, device_type, *by_dtypes(policy, device_type))
        for device_type in FORMATS
        for mode, policy in MODES.items()
    ]


def _device_type(device: str | torch.device) -> str:
    types = ACCELERATORS.get(str(device))
    if types is not None:
        return next((each for each in types if is_available(each)), types[0])
    try:
        return torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"supports(device={device!r}): expected a device type such as 'cpu' or 'cuda', or one of "
            f"{', '.join(ACCELERATORS)}"
        ) from error


def _strategy_name(strategy: str | Strategy | None) -> str | None:
    name = strategy.name if isinstance(strategy, Strategy) else strategy
    return None if name in ("auto", "single_device") else name


def _known_or_raise(group: str, name: str) -> str:
    message = discovery.missing(group, name, _CORE[group])
    if discovery.extra_of(group, name) is None:
        raise ValueError(message)
    return message


def _of_policy(policy: Policy, device_type: str, by_core: bool) -> Support:
    try:
        if by_core:
            check_runnable(policy)
    except ValueError as error:
        return Support("no", str(error))
    return Support(*by_dtypes(policy, device_type))


def _row(mode: str, device_type: str, strategy: str | None) -> SupportRow | None:
    """Returns the strategy's own row, else the one for one device; None: there is neither."""
    found = {row.strategy: row for row in table() if (row.mode, row.device) == (mode, device_type)}
    return found.get(strategy) or found.get(None)
