"""Discovery: which modes, strategies and support tables installed packages bring, as entry points.

    [project.entry-points."precision.plugins"]          mode -> factory(mode, **options) -> Precision
    nf4 = "precision_bnb:BitsandbytesPrecision"
    [project.entry-points."precision.strategies"]       name -> factory(**options) -> Strategy
    fsdp = "precision_fsdp:FSDPStrategy"
    [project.entry-points."precision.support"]          package -> function() -> its rows of the support table
    precision-bnb = "precision_bnb.support:rows"

Names are listed from the packages' metadata, without imports; `load` imports the one that is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from precision_core.policy.hints import hint
from precision_core.policy.messages import nearest

PLUGINS = "precision.plugins"
STRATEGIES = "precision.strategies"
SUPPORT = "precision.support"

_CALLS = {PLUGINS: "precision", STRATEGIES: "strategy", SUPPORT: "support"}

KNOWN: dict[str, dict[str, tuple[str, ...]]] = {
    PLUGINS: {
        "bnb": ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training"),
        "te": (
            "transformer-engine",
            "fp8-reference",
            "fp8-current-reference",
            "mxfp8-reference",
            "nvfp4-reference",
        ),
    },
    STRATEGIES: {"fsdp": ("fsdp",), "deepspeed": ("deepspeed",), "xla": ("xla",)},
}
"""Group -> extra of precision-core -> the names that its package brings: what to install for a missing name."""


def names(group: str) -> list[str]:
    """Returns the names that installed packages register in `group`, sorted."""
    return sorted(entry_points(group=group).names)


def find(group: str, name: str, *, taken: bool = False) -> EntryPoint | None:
    """Returns the entry point `name` in `group`, not imported; None if no installed package brings it.

    Raises:
        ValueError: two distributions claim the name (core is one of them if `taken`); names them.
    """
    found = {_distribution(entry): entry for entry in entry_points(group=group, name=name)}
    claims = sorted({*found, "precision-core"} if taken else found)
    if len(claims) > 1:
        raise ValueError(
            f'{_CALLS[group]} "{name}" is claimed by {" and by ".join(claims)}: uninstall all but one of them, or pass '
            "an object in place of the name"
        )
    return next(iter(found.values()), None)


def load(group: str, name: str) -> Any:
    """Imports and returns the object registered as `name` in `group`.

    Raises:
        ValueError: no installed package brings the name, with what to install; or two claim it.
        ImportError: the package that brings it cannot be imported; names it, with the error as its cause.
    """
    entry = find(group, name)
    if entry is None:
        raise ValueError(missing(group, name))
    try:
        return entry.load()
    except Exception as error:  # a vendor library that does not fit the machine raises anything
        raise ImportError(
            f'{_CALLS[group]} "{name}" is {entry.value} of {_distribution(entry)}, which cannot be imported: '
            f"{type(error).__name__}: {error}"
        ) from error


def missing(group: str, name: str, core: Iterable[str] = ()) -> str:
    """Returns the message for a `name` that no installed package brings: what to install, else the names there are.

    `core` are the names that core itself has.
    """
    extra = extra_of(group, name)
    if extra is not None:
        return f'{_CALLS[group]} "{name}" needs precision-{extra}: {how_to_install(extra)} [missing-package]'
    there = {"core has": list(core), "installed packages bring": names(group)}
    listing = "; ".join(f"{who} {', '.join(each)}" for who, each in there.items() if each)
    there_are = [*core, *known(group)]
    meant = hint(name, there_are, package_of) if group == PLUGINS else nearest(name, there_are)
    code = " [unknown-mode]" if group == PLUGINS else " [unknown-strategy]"
    return f'{_CALLS[group]} "{name}" is unknown{": " * bool(listing)}{listing}{meant}{code}'


def how_to_install(extra: str) -> str:
    """Returns the command that installs the package of an extra of precision-core, and where to run it."""
    return f"{install_command(extra)} in a checkout of the project (it is on no package index yet)"


def install_command(extra: str) -> str:
    """Returns the command alone."""
    return f"pip install ./packages/precision-{extra}"


def extra_of(group: str, name: str) -> str | None:
    """Returns the extra of precision-core that brings `name`, or None."""
    return next((extra for extra, known_names in KNOWN[group].items() if name in known_names), None)


def package_of(mode: str) -> str | None:
    """Returns the package of this project that brings a mode, or None."""
    extra = extra_of(PLUGINS, mode)
    return None if extra is None else f"precision-{extra}"


def known(group: str) -> list[str]:
    """Returns the names that installed packages bring, and those in `KNOWN`."""
    return sorted({*names(group), *(each for known_names in KNOWN[group].values() for each in known_names)})


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value
