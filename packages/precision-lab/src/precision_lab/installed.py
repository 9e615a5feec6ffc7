"""What is installed: precision packages, the names that they register, and whether their versions fit together.

All of it is read from metadata; nothing is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions

from packaging.requirements import Requirement  # matplotlib needs it, so it is here

from precision_core import ALIASES, MODES
from precision_core.strategies import STRATEGIES as CORES_STRATEGIES
from precision_core.support import KNOWN, PLUGINS, STRATEGIES, SUPPORT, find, install_command, names

VENDORS = (
    "torch",
    "bitsandbytes",
    "deepspeed",
    "torch_xla",
    "transformer_engine",
    "transformer-engine-torch",
    "torchao",
)

_CORE_NAMES = {PLUGINS: {*MODES, *map(str, ALIASES)}, STRATEGIES: {*CORES_STRATEGIES}, SUPPORT: set[str]()}


@dataclass(frozen=True)
class Package:
    """An installed distribution, and the names that it registers."""

    name: str
    version: str
    modes: list[str]
    strategies: list[str]
    support: list[str]


@dataclass(frozen=True)
class Missing:
    """Modes and strategies of a package that is not installed, and the command that installs it from a checkout."""

    names: list[str]
    package: str
    install: str


def find_distributions() -> dict[str, Distribution]:
    """Returns everything that is installed, by normalized name; of two with one name the first, which is imported."""
    found: dict[str, Distribution] = {}
    for each in distributions():
        metadata = each.metadata
        if "Name" in metadata:  # metadata that a broken uninstall left behind has none
            found.setdefault(_normalized(metadata["Name"]), each)
    return found


def find_packages(installed: dict[str, Distribution]) -> list[Package]:
    """Returns the distributions that are called precision-*, and those that register anything; core first."""
    packages = []
    for name, each in installed.items():
        modes, strategies, support = (_brought(each, group) for group in (PLUGINS, STRATEGIES, SUPPORT))
        if name == "precision-core":  # what it has itself is no entry point
            modes, strategies = [*MODES, *modes], [*CORES_STRATEGIES, *strategies]
        if name.startswith("precision-") or modes or strategies or support:
            packages.append(Package(name, each.version, modes, strategies, support))
    return sorted(packages, key=lambda package: (package.name != "precision-core", package.name))


def find_vendors(installed: dict[str, Distribution]) -> dict[str, str | None]:
    """Returns vendor library -> its version; None: it is not installed."""
    return {vendor: _version(vendor, installed) for vendor in VENDORS}


def find_missing() -> list[Missing]:
    """Returns the modes and strategies that are known but that no installed package brings."""
    missing = [
        Missing([name for name in known if name not in names(group)], f"precision-{extra}", install_command(extra))
        for group, extras in KNOWN.items()
        for extra, known in extras.items()
    ]
    return [each for each in missing if each.names]


def duplicate_names() -> Iterator[str]:
    """Yields an error text for each name that two distributions register, core's own names included."""
    for group, taken in _CORE_NAMES.items():
        for name in names(group):
            try:
                find(group, name, taken=name in taken)
            except ValueError as error:
                yield str(error)


def unmet_requirements(packages: list[Package], installed: dict[str, Distribution]) -> Iterator[str]:
    """Yields an error text for each requirement of `packages` that is missing or installed in another version."""
    for package in packages:
        try:
            for text in installed[package.name].requires or ():
                yield from _unmet(package.name, Requirement(text), installed)
        except ValueError as error:  # a requirement or a version that cannot be read
            yield f"{package.name}: {error}"


def _unmet(package: str, requirement: Requirement, installed: dict[str, Distribution]) -> Iterator[str]:
    here = _version(requirement.name, installed)
    optional = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
    ours = _normalized(requirement.name).startswith("precision-")
    if here is None and not optional:
        yield f"{package} needs {requirement}, which is not installed"
    # Which extras were asked for is not recorded; ours have to fit each other in any case.
    elif here and (ours or not optional) and not requirement.specifier.contains(here, prereleases=True):
        yield f"{package} needs {requirement}, but {requirement.name} {here} is installed"


def _brought(each: Distribution, group: str) -> list[str]:
    return sorted(entry.name for entry in each.entry_points if entry.group == group)


def _version(name: str, installed: dict[str, Distribution]) -> str | None:
    found = installed.get(_normalized(name))
    return found.version if found else None


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
