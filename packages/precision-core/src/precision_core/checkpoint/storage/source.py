"""Sources: a checkpoint to read, file or folder, whatever strategy wrote it: first its structure, then its values.

Each rank reads on its own, and waits for no other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from precision_core.checkpoint.error import RESERVED
from precision_core.checkpoint.shards import cut, deep_copied
from precision_core.checkpoint.storage import engine as engine_checkpoint
from precision_core.checkpoint.storage import file as checkpoint
from precision_core.checkpoint.storage import manifest as folder_manifest
from precision_core.checkpoint.tree import KeyPath, map_leaves


class Source(Protocol):
    """A checkpoint to read. The tensors in `content`, its header included, may be placeholders until `fetch`."""

    content: dict[str, Any]
    refused: Mapping[KeyPath, str]
    """Key path -> reason, of objects whose values no strategy can read."""

    def verify(self, rank: int = 0, ranks: int = 1) -> None:
        """Raises `CheckpointError` if it is damaged; each of `ranks` ranks verifies its share."""

    def fetch(
        self, tree: Any, shardings: Mapping[KeyPath, Tensor] = {}, leave: Callable[[KeyPath], bool] = lambda _: False
    ) -> Any:
        """Materialises the placeholders in `tree`, a part of `content`; returns a copy of it.

        A key path in `shardings` gives a DTensor with this rank's shards; where `leave(key_path)`, the tensor is on
        the meta device.
        """

    def everything(self) -> dict[str, Any]:
        """Returns a copy of all of the content but its header, unsharded."""


def open_checkpoint(path: Path, trust: bool) -> Source:
    """Opens the checkpoint at `path` and reads its structure; runs pickled code only if `trust`.

    Raises:
        CheckpointError: damaged, not of `Fabric.save`, or of a newer format.
        FileNotFoundError: there is none.
    """
    if engine_checkpoint.is_engines(path):
        return _EngineSource(path, trust)
    if folder_manifest.is_folder(path):
        from precision_core.checkpoint.storage.folder import Folder  # takes seconds to import

        folder = Folder(path, trust=trust)
        checkpoint.check_header(path, folder.content)
        return folder
    return _FileSource(path, trust)


class _FileSource:
    """A file: its tensors are memory-mapped."""

    refused: Mapping[KeyPath, str] = {}

    def __init__(self, path: Path, trust: bool) -> None:
        self.content = checkpoint.read(path, trust=trust)

    def verify(self, rank: int = 0, ranks: int = 1) -> None:
        pass  # verified before it was unpickled

    def fetch(
        self, tree: Any, shardings: Mapping[KeyPath, Tensor] = {}, leave: Callable[[KeyPath], bool] = lambda _: False
    ) -> Any:
        def value(key_path: KeyPath, leaf: Any) -> Any:
            if key_path in shardings:
                return cut(leaf, shardings[key_path])
            return leaf.to("meta") if isinstance(leaf, Tensor) and leave(key_path) else leaf

        return map_leaves(tree, value)

    def everything(self) -> dict[str, Any]:
        return deep_copied({key: value for key, value in self.content.items() if key != RESERVED})


class _EngineSource(_FileSource):
    """A folder with an engine's own files, which the package that wrote them reads."""

    def __init__(self, path: Path, trust: bool) -> None:
        self.content, self.refused = engine_checkpoint.read(path, trust)
