"""Engine checkpoints: folders with files in the format of a strategy's engine, as other strategies read them.

Such a folder also has core's file, `state.ckpt`, and a manifest. In `state.ckpt` the engine's objects are records that
describe the engine's files: `{strategy's name: "model" or "optimizer", ...}`. The package that brings the strategy of
that name turns them into values.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from precision_core.checkpoint.error import CheckpointError
from precision_core.checkpoint.storage import file as checkpoint
from precision_core.checkpoint.storage import manifest as folder_manifest
from precision_core.checkpoint.tree import KeyPath
from precision_core.support import discovery
from precision_core.support.discovery import STRATEGIES

STATE = "state.ckpt"


def folder_of(path: Path) -> Path:
    """Returns the folder if `path` is an engine checkpoint's `state.ckpt`, else `path`."""
    return path.parent if path.name == STATE and (path.parent / folder_manifest.MANIFEST).exists() else path


def is_engines(path: Path) -> bool:
    """Whether `path` is an engine's checkpoint folder."""
    return folder_manifest.is_folder(path) and (folder_manifest.find(path) / STATE).exists()


def read(path: Path, trust: bool) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """Returns the folder's content, with models' values; and key path -> reason for objects that cannot be read.

    Raises:
        CheckpointError: incomplete, damaged, or the package that wrote it is not installed; says what to install.
    """
    folder = folder_manifest.find(path.absolute())
    manifest = folder_manifest.read(folder)
    folder_manifest.verify(folder, manifest, sorted(manifest.files))
    content = checkpoint.read(folder / STATE, trust=trust)
    name = next(_engines(content), None)
    if name is None:
        return content, {}
    try:
        engines = discovery.load(STRATEGIES, name).checkpoint_format
    except (ValueError, ImportError) as error:
        raise CheckpointError(
            f"{path} was written by the engine of {name}, and only its package reads it: {error}"
        ) from error
    if engines is None:
        raise CheckpointError(f"{path} was written by the engine of {name}, whose strategy has no checkpoint_format")
    return engines.read(folder, content, trust)


def _engines(content: Any) -> Iterator[str]:
    """Yields the names of the strategies whose records are in `content`."""
    if isinstance(content, dict):
        yield from (key for key in discovery.known(STRATEGIES) if isinstance(content.get(key), str))
        for value in content.values():
            yield from _engines(value)
