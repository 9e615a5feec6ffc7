"""CheckpointFormat: what a strategy has whose engine writes checkpoints in files of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from precision_core.checkpoint.live.state import Filter


class CheckpointFormat(Protocol):
    """Checkpoints in an engine's own files: a folder with a manifest and, for all else, core's `state.ckpt`."""

    def takes(self, strategy: Any, state: dict[str, Any]) -> bool:
        """Whether `state` holds objects that only the engine of `strategy` can save; else core's format is written."""

    def save(self, strategy: Any, path: Path, state: dict[str, Any], filter: Filter | None) -> None:
        """Does what `Fabric.save` does."""

    def load(
        self, strategy: Any, path: Path, state: dict[str, Any] | None, strict: bool, filter: Filter | None, trust: bool
    ) -> dict[str, Any]:
        """Does what `Fabric.load` does with a folder that `save` wrote."""

    def read(
        self, folder: Path, content: dict[str, Any], trust: bool
    ) -> tuple[dict[str, Any], dict[tuple[Any, ...], str]]:
        """Returns `content`, of a folder that `save` wrote, for other strategies to load.

        Models in it have their values; the second dict says of other objects, by key path, why they have none.
        """
