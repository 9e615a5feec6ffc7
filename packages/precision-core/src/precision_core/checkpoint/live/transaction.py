"""A transaction: steps that are undone if one raises, and a last part that is not undone."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from precision_core.checkpoint.error import CheckpointError

Name = str | tuple[object, ...]
"""A step's name in messages: text, or the key path of an object."""
Undo = Callable[[], None]
Step = tuple[str, Callable[[], None], Undo]
"""A name for messages, the function to call, and its undo."""


class Transaction:
    """Context that runs all undos, last first, if anything is raised, also those of steps that had not begun.

    Raises:
        CheckpointError: from an `Exception`, naming the step; KeyboardInterrupt and the like pass unchanged.
    """

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self._step: Name = ""
        self._undos: list[tuple[Name, Undo]] = []
        self._written: list[Name] | None = None  # since `commit`

    def undo_by(self, name: Name, undo: Undo) -> None:
        """Registers a step's undo."""
        self._undos.append((name, undo))

    def at(self, name: Name) -> None:
        """Names the step that comes next."""
        self._step = name
        if self._written is not None:
            self._written.append(name)

    def commit(self) -> None:
        """Begins the last part, which is not undone."""
        self._written = []

    def __enter__(self) -> Transaction:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is None:
            return
        lost = self._roll_back() + (self._written or [])
        if not isinstance(error, Exception) or isinstance(error, CheckpointError):
            return
        state = f"{', '.join(map(_text, lost))} may have some of its values" if lost else "nothing was changed"
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{self._origin}: {_text(self._step)} could not be loaded, {state}: {reason}") from error

    def _roll_back(self) -> list[Name]:
        """Runs the undos, and returns the names of those that raised."""
        failed = []
        for name, undo in reversed(self._undos):
            try:
                undo()
            except BaseException:  # the others still have to run
                failed.append(name)
        return failed


def _text(name: Name) -> str:
    return name if isinstance(name, str) else ".".join(map(str, name))
