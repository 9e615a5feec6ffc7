"""What an interrupted comparison goes on from: the rows so far, and a checkpoint of each run that was under way.

They lie in a folder beside the results, `resume`, and go when the comparison is done. Only the same command goes on
from them: the same options, task file, torch and Python. `resume.json` is replaced whole, and names the checkpoints
that belong to it: whenever the machine stops, the folder holds one that fits.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from precision_lab.results import Comparison, Row

_VERSION = 1


class Saved:
    """The folder `resume` in `folder`, for a comparison with these `options` (plain values)."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self._folder = folder / "resume"
        self._options = json.loads(json.dumps(options)) | {
            "version": _VERSION,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        }
        self._checkpoints: dict[str, str] = {}

    def read(self, comparison: Comparison) -> str:
        """Fills in what an interrupted run of the same command left; returns what to tell the user, "" for nothing."""
        try:
            state = json.loads((self._folder / "resume.json").read_text())
        except (OSError, ValueError):
            return ""
        before = state.get("options", {})
        differs = sorted(
            key for key in before.keys() | self._options.keys() if before.get(key) != self._options.get(key)
        )
        if differs:
            return f"an interrupted run in this folder had another {', '.join(differs)}: starting anew"
        self._checkpoints = {
            label: file for label, file in state["checkpoints"].items() if (self._folder / file).is_file()
        }
        rows = {row.label: row for row in (*comparison.rows, *comparison.repeats)}
        for each in state["rows"]:
            label = Row(**each).label
            # what failed, or was under way without a checkpoint, starts anew
            if label in rows and (each["status"] == "done" or label in self._checkpoints):
                vars(rows[label]).update(each)
        comparison.block = state["block"]
        comparison.environment = state["environment"]
        steps = sum(len(row.losses) for row in rows.values())
        return f"going on where it was interrupted: {steps} of {len(rows) * comparison.steps} steps are done"

    @property
    def there(self) -> bool:
        """Whether there is something to go on from."""
        return (self._folder / "resume.json").is_file()

    def checkpoint_of(self, row: Row) -> str:
        """Returns the checkpoint to go on from, "" for none."""
        file = self._checkpoints.get(row.label)
        return "" if file is None or not row.losses else str(self._folder / file)

    def file_for(self, row: Row) -> Path:
        """Returns the path of a new checkpoint."""
        self._folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(row.label.encode()).hexdigest()[:12]  # a policy may be longer than a file's name
        return self._folder / f"{name}-{len(row.losses)}.ckpt"

    def has_saved(self, row: Row) -> None:
        """Notes that the checkpoint of the row's last step is on disk."""
        self._checkpoints[row.label] = self.file_for(row).name

    def write(self, comparison: Comparison) -> None:
        """Replaces `resume.json`, and deletes the checkpoints that it does not name."""
        self._folder.mkdir(parents=True, exist_ok=True)
        rows = (*comparison.rows, *comparison.repeats)
        kept = {
            row.label: file for row in rows if row.status == "not run" and (file := self._checkpoints.get(row.label))
        }
        state = {
            "options": self._options,
            "block": comparison.block,
            "environment": comparison.environment,
            "rows": [_cut(row, kept.get(row.label)) for row in rows],
            "checkpoints": kept,
        }
        temporary = self._folder / "resume.json.new"
        temporary.write_text(json.dumps(state))
        os.replace(temporary, self._folder / "resume.json")
        for path in self._folder.glob("*.ckpt"):
            if path.name not in kept.values():
                path.unlink()

    def clear(self) -> None:
        """Deletes the folder: the comparison is done, or is to start anew."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _cut(row: Row, checkpoint: str | None) -> dict[str, Any]:
    """Returns the row as it was at its checkpoint."""
    values = asdict(row)
    if row.status == "not run":
        steps = int(checkpoint.rpartition("-")[2].removesuffix(".ckpt")) if checkpoint else 0
        values |= {"losses": row.losses[:steps], "step_seconds": row.step_seconds[:steps]}
    return values


def digest(path: str) -> str:
    """Returns the SHA-256 of a file, "" where it is none."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path and Path(path).is_file() else ""
