"""From what the user passed as `precision` and `strategy` to the objects that run."""

from __future__ import annotations

from precision_core import discovery
from precision_core.devices import ACCELERATORS
from precision_core.dtypes import nearest
from precision_core.layout import Layout
from precision_core.policy import ALIASES, MODES, Policy
from precision_core.precision import Precision
from precision_core.strategies import STRATEGIES, Strategy


def resolve_precision(precision: str | int | Policy | Precision, strategy: Strategy) -> Precision:
    """Returns the plugin for a mode, an alias, a policy or its spelling; a plugin object is returned as it is.

    Core's modes go to the strategy, which may have a plugin of its own for them; others to the package that has them.

    Raises:
        ValueError: no mode, with what to install if it is known; a policy that nothing runs; a mode that two
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


def resolve_strategy(strategy: str | Strategy, accelerator: str, layout: Layout) -> Strategy:
    """Returns the strategy of that name on this process's device; an object keeps the device that it was made for.

    Raises:
        ValueError: an unknown name, with what to install if it is known; an object for another kind of device; several
            processes under a strategy that runs in one.
    """
    made = strategy if isinstance(strategy, Strategy) else _by_name(strategy, accelerator, layout)
    if "device" not in vars(made):
        made.device = layout.device
    if accelerator != "auto" and made.device.type not in ACCELERATORS[accelerator]:
        raise ValueError(
            f"Fabric(accelerator={accelerator!r}) got a {type(made).__name__} on {str(made.device)!r}: "
            "leave accelerator out, or make the strategy for that device"
        )
    if layout.world_size > 1 and layout.asked and not made.multiprocess:
        raise ValueError(
            f"{type(made).__name__} runs in one process, and this run has {layout.world_size}: pass devices=1, or "
            'strategy="ddp"'
        )
    return made


def _by_name(strategy: str, accelerator: str, layout: Layout) -> Strategy:
    if not isinstance(strategy, str):
        raise ValueError(
            f'Fabric(strategy={strategy!r}): expected "auto", the name of a strategy, or a Strategy object'
        )
    name = _auto(accelerator, layout) if strategy == "auto" else strategy
    entry = discovery.find(discovery.STRATEGIES, name, taken=name in STRATEGIES)
    if name not in STRATEGIES and entry is None:
        raise ValueError(discovery.missing(discovery.STRATEGIES, name, ("auto", *STRATEGIES)))
    made = (STRATEGIES.get(name) or discovery.load(discovery.STRATEGIES, name))()
    if not isinstance(made, Strategy):
        raise ValueError(f'strategy="{name}": its factory returned a {type(made).__name__}, not a Strategy')
    made.device = layout.device
    return made


def _auto(accelerator: str, layout: Layout) -> str:
    if accelerator == "tpu":
        return "xla"
    return "ddp" if layout.world_size > 1 else "single_device"


def is_core_mode(precision: object) -> bool:
    """Whether `precision` is core's to parse: no string, or one that starts with a mode, an alias, or a `key=value`."""
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
        hint = "" if "did you mean" in str(error) else nearest(base, discovery.known(discovery.PLUGINS))
        return f"{error}{brought}{hint}"
    raise AssertionError(f"{mode!r} is no mode of core")
