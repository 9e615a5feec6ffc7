"""Which modes and strategies there are, and which run here.

Other packages import what `__all__` lists from here; the modules themselves are private.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from precision_core.support import discovery
from precision_core.support.discovery import KNOWN, PLUGINS, STRATEGIES, SUPPORT, find, install_command, names
from precision_core.support.resolve import (
    base_of,
    is_core_mode,
    load_plugin,
    refusal,
    resolve_precision,
    resolve_strategy,
)

if TYPE_CHECKING:
    from precision_core.support.chosen import (
        Chosen,
        machine_fingerprint,
        model_fingerprint,
        read_chosen,
        write_chosen,
    )
    from precision_core.support.support import Support, supports
    from precision_core.support.table import SupportRow, read_table

__all__ = [
    "KNOWN",
    "PLUGINS",
    "STRATEGIES",
    "SUPPORT",
    "Chosen",
    "Support",
    "SupportRow",
    "base_of",
    "discovery",
    "find",
    "install_command",
    "is_core_mode",
    "load_plugin",
    "machine_fingerprint",
    "model_fingerprint",
    "names",
    "read_chosen",
    "read_table",
    "refusal",
    "resolve_precision",
    "resolve_strategy",
    "supports",
    "write_chosen",
]

# Imported on first use: training needs no support table.
_HOMES = {"Support": "support", "SupportRow": "table", "read_table": "table", "supports": "support"}
_CHOSEN = ("Chosen", "machine_fingerprint", "model_fingerprint", "read_chosen", "write_chosen")
_HOMES |= dict.fromkeys(_CHOSEN, "chosen")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
