"""Resolves the user's `precision` and `strategy` to objects, and checks that they run together."""

from __future__ import annotations

import re
from collections.abc import Sequence

from precision_core.policy.hints import hint
from precision_core.policy.policy import ALIASES, MODES, Policy
from precision_core.precision.base import Precision
from precision_core.strategies import STRATEGIES, Strategy
from precision_core.strategies.layout import Layout, choose_type, make_layout
from precision_core.support import discovery

_CODE = re.compile(r" \[[a-z0-9-]+\]$")


def resolve_precision(precision: str | int | Policy | Precision, strategy: Strategy) -> Precision:
    """Returns the plugin for a mode, an alias, a policy or its spelling; a plugin object is returned as it is.

    Core's modes go to the strategy, which may have a plugin of its own for them; others to the package that has them.

    Raises:
        ValueError: an unknown mode (with what to install, if known), a policy that no plugin runs, a mode that two
            distributions claim.
        ImportError: the package that brings the mode cannot be imported.
    """
    if isinstance(precision, Precision):
        return precision
    if isinstance(precision, str) and not is_core_mode(precision):
        return load_plugin(precision)
    if isinstance(precision, str):
        discovery.find(discovery.PLUGINS, base_of(precision), taken=True)
    return strategy.make_precision(Policy.parse(precision))


def resolve_strategy(
    strategy: str | Strategy, accelerator: str, devices: int | str | Sequence[int], num_nodes: int
) -> tuple[Strategy, Layout]:
    """Returns the strategy of that name, on this process's device, and the run's layout.

    Raises:
        ValueError: an unknown name (with what to install, if known), devices that are not here or that the strategy
            refuses, several processes under a strategy that runs in one.
    """
    if strategy == "auto":
        strategy = _auto(accelerator, devices, num_nodes)
    made = strategy if isinstance(strategy, Strategy) else _by_name(strategy)
    layout = made.lay_out(accelerator, devices, num_nodes)
    if layout.world_size > 1 and layout.asked and not made.multiprocess:
        raise ValueError(
            f"{type(made).__name__} runs in one process, and this run has {layout.world_size}: pass devices=1, or "
            'strategy="ddp"'
        )
    return made, layout


def refusal(precision: Precision, strategy: Strategy) -> str | None:
    """Returns why `precision` cannot run under `strategy`, and what to pass instead; None if it can.

    Both are asked: the plugin (`Precision.refuses`), then the strategy (`Strategy.refuses`).
    """
    return precision.refuses(strategy) or strategy.refuses(precision)


def check_composition(precision: Precision, strategy: Strategy) -> None:
    """Raises `ValueError` naming the pair and the reason when `precision` cannot run under `strategy`."""
    reason = refusal(precision, strategy)
    if reason is not None:
        code = "" if _CODE.search(reason) else " [cannot-run-here]"  # a reason's own code says more
        raise ValueError(
            f'precision="{precision.mode}" ({type(precision).__name__}) cannot run under {type(strategy).__name__} '
            f"on {strategy.device}: {reason}{code}"
        )


def _by_name(name: str) -> Strategy:
    if not isinstance(name, str):
        raise ValueError(f'Fabric(strategy={name!r}): expected "auto", the name of a strategy, or a Strategy object')
    entry = discovery.find(discovery.STRATEGIES, name, taken=name in STRATEGIES)
    if name not in STRATEGIES and entry is None:
        raise ValueError(discovery.missing(discovery.STRATEGIES, name, ("auto", *STRATEGIES)))
    made = (STRATEGIES.get(name) or discovery.load(discovery.STRATEGIES, name))()
    if not isinstance(made, Strategy):
        raise ValueError(f'strategy="{name}": its factory returned a {type(made).__name__}, not a Strategy')
    vars(made).pop("device", None)  # a device is kept only from an object that the user made
    return made


def _auto(accelerator: str, devices: int | str | Sequence[int], num_nodes: int) -> str:
    if accelerator == "tpu" and discovery.find(discovery.STRATEGIES, "xla") is None:
        choose_type("tpu")  # says what to install
    if accelerator == "tpu":
        return "xla"
    return "ddp" if make_layout(accelerator, devices, num_nodes).world_size > 1 else "single_device"


def is_core_mode(precision: object) -> bool:
    """Whether core parses `precision`: not a string, or one that starts with a mode, an alias, or `key=value`."""
    if not isinstance(precision, str):
        return True
    base = base_of(precision)
    return "=" in base or base in MODES or base in ALIASES


def load_plugin(mode: str) -> Precision:
    """Returns the plugin of the installed package that brings `mode`; raises as `resolve_precision` does."""
    base = base_of(mode)
    if discovery.find(discovery.PLUGINS, base) is None:
        raise ValueError(_unknown(mode, base))
    plugin = discovery.load(discovery.PLUGINS, base)(mode)
    if not isinstance(plugin, Precision):
        raise ValueError(f'precision="{mode}": its factory returned a {type(plugin).__name__}, not a Precision')
    if base != mode and not plugin.policy.exceptions:
        raise ValueError(f'precision="{mode}": {type(plugin).__name__} applies no exceptions; pass "{base}"')
    return plugin


def base_of(precision: str) -> str:
    """Returns the mode without its exceptions."""
    return precision.partition(";")[0].strip()


def _unknown(mode: str, base: str) -> str:
    if discovery.extra_of(discovery.PLUGINS, base) is not None:
        return discovery.missing(discovery.PLUGINS, base)
    try:
        Policy.parse(mode)
    except ValueError as error:
        here = discovery.names(discovery.PLUGINS)
        brought = f"; installed packages bring {', '.join(here)}" if here else ""
        there_are = [*MODES, *discovery.known(discovery.PLUGINS)]
        without = str(error).removesuffix(hint(base, MODES))
        return f"{without}{brought}{hint(base, there_are, discovery.package_of)} [unknown-mode]"
    raise AssertionError(f"{mode!r} is not a mode of core")
