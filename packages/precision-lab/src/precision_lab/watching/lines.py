"""The file: one JSON object a line."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import IO, Any

_STRICT = json.JSONEncoder(allow_nan=False)
_UNWRITTEN = 256
_SECONDS = 10.0
"""Lines that wait to be written together, and for how long."""


class Lines:
    """Appends to a file, which is opened at the first line. Where the process is killed, lines of seconds are lost."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: IO[str] | None = None
        self._waiting: list[str] = []
        self._written = time.monotonic()

    def write(self, record: dict[str, Any], flush: bool = False) -> None:
        """Adds a line. Numbers that are not finite become "nan", "inf", "-inf": JSON has none."""
        try:
            text = _STRICT.encode(record)
        except ValueError:
            text = _STRICT.encode(_plain(record))
        self._waiting.append(text + "\n")
        if flush or len(self._waiting) >= _UNWRITTEN or time.monotonic() - self._written > _SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what waits."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write("".join(self._waiting))
        self._file.flush()
        self._waiting.clear()
        self._written = time.monotonic()

    def close(self) -> None:
        """Writes what waits and closes the file."""
        if self._waiting:
            self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value
