"""Sources: a checkpoint, file or folder, whatever strategy wrote it, as it is read: what it holds first, values later.

Each rank reads for itself and waits for no other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from precision_core.checkpoint.error import RESERVED
from precision_core.checkpoint.storage import engine as engine_checkpoint
from precision_core.checkpoint.storage import file as checkpoint
from precision_core.checkpoint.storage import manifest as folder_manifest
from precision_core.checkpoint.tensors import deep_copied
from precision_core.checkpoint.tree import Path as Place
from precision_core.checkpoint.tree import map_leaves

if TYPE_CHECKING:
    from precision_core.checkpoint.storage.folder import Folder


class Source(Protocol):
    """What a checkpoint holds. The tensors in `content`, its header included, stand for their values until `fetch`."""

    content: dict[str, Any]
    refused: Mapping[Place, str]
    """Places of objects for which it has no values that any strategy reads, and why."""

    def verify(self, rank: int = 0, ranks: int = 1) -> None:
        """Raises `CheckpointError` if it is damaged; `ranks` look at all of it together."""

    def fetch(
        self, tree: Any, shardings: Mapping[Place, Tensor] = {}, leave: Callable[[Place], bool] = lambda _: False
    ) -> Any:
        """Returns `tree`, of parts of `content`, with values: this rank's shards where `shardings` has a DTensor.

        Where `leave(place)`, the tensor is returned on the meta device.
        """

    def everything(self) -> dict[str, Any]:
        """Returns all of it, whole, and depending on nothing, but for the header."""


def open_checkpoint(path: Path, trust: bool) -> Source:
    """Returns the checkpoint at `path`.

    Raises:
        CheckpointError: damaged, foreign or newer.
        FileNotFoundError: there is none.
    """
    if engine_checkpoint.is_engines(path):
        return _EngineSource(path, trust)
    if folder_manifest.is_folder(path):
        from precision_core.checkpoint.storage.folder import Folder  # takes seconds to import

        return _FolderSource(path, Folder(path, trust=trust))
    return _FileSource(path, trust)


class _FileSource:
    """Its tensors are mapped from the file."""

    refused: Mapping[Place, str] = {}

    def __init__(self, path: Path, trust: bool) -> None:
        self.content = checkpoint.read(path, trust=trust)

    def verify(self, rank: int = 0, ranks: int = 1) -> None:
        pass  # was done before it was unpickled

    def fetch(
        self, tree: Any, shardings: Mapping[Place, Tensor] = {}, leave: Callable[[Place], bool] = lambda _: False
    ) -> Any:
        from precision_core.checkpoint.shards import cut

        def value(place: Place, leaf: Any) -> Any:
            if place in shardings:
                return cut(leaf, shardings[place])
            return leaf.to("meta") if isinstance(leaf, Tensor) and leave(place) else leaf

        return map_leaves(tree, value)

    def everything(self) -> dict[str, Any]:
        return deep_copied(_less_header(self.content))


class _EngineSource(_FileSource):
    """A folder with an engine's own files, of which the package that wrote them makes values."""

    def __init__(self, path: Path, trust: bool) -> None:
        self.content, self.refused = engine_checkpoint.read(path, trust)


class _FolderSource:
    refused: Mapping[Place, str] = {}

    def __init__(self, path: Path, folder: Folder) -> None:
        checkpoint.check_header(path, folder.structure)
        self._folder, self.content = folder, folder.structure

    def verify(self, rank: int = 0, ranks: int = 1) -> None:
        self._folder.verify(rank, ranks)

    def fetch(
        self, tree: Any, shardings: Mapping[Place, Tensor] = {}, leave: Callable[[Place], bool] = lambda _: False
    ) -> Any:
        from precision_core.checkpoint.shards import host_like

        def host(place: Place, stand_in: Tensor) -> Tensor | None:
            if place in shardings:
                return host_like(shardings[place], stand_in.dtype)
            return None if leave(place) else torch.empty_like(stand_in, device="cpu")

        return self._folder.fill(tree, host)

    def everything(self) -> dict[str, Any]:
        self.verify()
        return self.fetch(_less_header(self.content))


def _less_header(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != RESERVED}
