"""The support query: whether this machine runs a mode, how well, and why (not).

The answer comes from the support table (`table`), else from the dtypes of the mode's policy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from precision_core.hardware import ACCELERATORS, FORMATS, Level, by_dtypes, is_available
from precision_core.policy.policy import MODES, Policy
from precision_core.precision.runnable import check_runnable
from precision_core.strategies import STRATEGIES, Strategy
from precision_core.support import discovery
from precision_core.support.resolve import base_of, is_core_mode, load_plugin
from precision_core.support.table import read_table

_CORE = {discovery.PLUGINS: MODES, discovery.STRATEGIES: ("auto", *STRATEGIES)}


@dataclass(frozen=True)
class Support:
    """An answer: level ("native", "emulated", "slow" or "no") and reason. Its truth value is False for "no"."""

    level: Level
    reason: str

    def __bool__(self) -> bool:
        return self.level != "no"

    def __str__(self) -> str:
        return f"{self.level}: {self.reason}"


def supports(mode: str | int | Policy, device: str | torch.device, strategy: str | Strategy | None = None) -> Support:
    """Returns how well this machine runs `mode` on a kind of device under a strategy, and why.

    Args:
        mode: any mode that `Fabric(precision=...)` takes, those of installed packages included, or a policy.
        device: a device or its type ("cuda", "cuda:1"), or an accelerator ("gpu", "tpu").
        strategy: a strategy or its name; None and "auto" are one device.

    Raises:
        ValueError: an unknown mode, device or strategy. One that is known but not installed is a "no".
        ImportError: a package whose rows may be the answer cannot be imported; names it.
    """
    if isinstance(mode, str) and is_core_mode(mode):
        discovery.find(discovery.PLUGINS, base_of(mode), taken=True)  # raises when a package claims it, as Fabric does
    device_type = _device_type(device)
    name = _strategy_name(strategy)
    if name is not None and name not in STRATEGIES and discovery.find(discovery.STRATEGIES, name) is None:
        return Support("no", _known_or_raise(discovery.STRATEGIES, name))
    if device_type in FORMATS and not is_available(device_type):
        return Support("no", f"torch finds no {device_type} device here")
    if not is_core_mode(mode) and discovery.find(discovery.PLUGINS, base_of(str(mode))) is None:
        return Support("no", _known_or_raise(discovery.PLUGINS, base_of(str(mode))))
    policy = Policy.parse(mode) if is_core_mode(mode) else None  # None: a package's
    table = read_table()
    found = {
        row.strategy: row
        for row in table.rows
        if (row.mode, row.device) == (str(policy or base_of(str(mode))), device_type)
    }
    if (
        table.problems and name not in found and (policy is None or name is not None)
    ):  # the answer may be among those rows
        raise ImportError("; ".join(table.problems))
    row = found.get(name) or found.get(None)
    if row is not None:
        return Support(row.level, row.reason)
    return _of_policy(policy or load_plugin(str(mode)).policy, device_type, by_core=policy is not None)


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
