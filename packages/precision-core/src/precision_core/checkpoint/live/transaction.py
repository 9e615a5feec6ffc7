"""A transaction: steps that are taken back if one raises, and a last part that is not taken back."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from precision_core.checkpoint.error import CheckpointError

Name = str | tuple[object, ...]
"""What messages call a step: text, or the keys that lead to an object."""
Undo = Callable[[], None]
Step = tuple[str, Callable[[], None], Undo]
"""A name for messages, what to do, and what takes it back."""


class Transaction:
    """Context in which an exception of any kind takes everything back, last first, whether it had begun or not.

    Raises:
        CheckpointError: in place of an `Exception`, naming the step; interrupts and the like stay what they are.
    """

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self._step: Name = ""
        self._undos: list[tuple[Name, Undo]] = []
        self._written: list[Name] | None = None  # since `commit`

    def undo_by(self, name: Name, undo: Undo) -> None:
        """Takes note of what takes a step back."""
        self._undos.append((name, undo))

    def at(self, name: Name) -> None:
        """Says which step is next."""
        self._step = name
        if self._written is not None:
            self._written.append(name)

    def commit(self) -> None:
        """Begins the last part, which is not taken back."""
        self._written = []

    def __enter__(self) -> Transaction:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is None:
            return
        lost = self._roll_back() + (self._written or [])
        if not isinstance(error, Exception) or isinstance(error, CheckpointError):
            return
        state = f"{', '.join(map(_text, lost))} may hold parts of it" if lost else "nothing was changed"
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{self._origin}: {_text(self._step)} could not be loaded, {state}: {reason}") from error

    def _roll_back(self) -> list[Name]:
        """Runs the undos and returns the names of those that raised."""
        failed = []
        for name, undo in reversed(self._undos):
            try:
                undo()
            except BaseException:  # the others are to be brought back still
                failed.append(name)
        return failed


def _text(name: Name) -> str:
    return name if isinstance(name, str) else ".".join(map(str, name))
