"""What is saved and loaded, all or nothing.

Other packages import what `__all__` lists from here; the modules themselves are private.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from precision_core.checkpoint import load as load
    from precision_core.checkpoint import presence as presence
    from precision_core.checkpoint import save as save
    from precision_core.checkpoint.agreement import gather, together
    from precision_core.checkpoint.error import RESERVED, CheckpointError
    from precision_core.checkpoint.live.state import Filter, stateful_objects
    from precision_core.checkpoint.paths import local_path
    from precision_core.checkpoint.shards import cut, is_sharded
    from precision_core.checkpoint.storage import file as file
    from precision_core.checkpoint.storage import manifest as manifest
    from precision_core.checkpoint.storage.manifest import new_folder

__all__ = [
    "RESERVED",
    "CheckpointError",
    "Filter",
    "cut",
    "file",
    "gather",
    "is_sharded",
    "load",
    "local_path",
    "manifest",
    "new_folder",
    "presence",
    "save",
    "stateful_objects",
    "together",
]

# Imported on first use: `import precision_core` imports none of them.
_HOMES = {
    "CheckpointError": "error",
    "Filter": "live.state",
    "RESERVED": "error",
    "cut": "shards",
    "file": "storage.file",
    "gather": "agreement",
    "is_sharded": "shards",
    "local_path": "paths",
    "manifest": "storage.manifest",
    "new_folder": "storage.manifest",
    "stateful_objects": "live.state",
    "together": "agreement",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_HOMES[name]}")
    return module if _HOMES[name].endswith(f".{name}") else getattr(module, name)
