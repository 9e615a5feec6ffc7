"""Files of `precision watch`: of one run, or of several ranks of one."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

_SECONDS = 600.0
"""Between the starts of ranks of one run at most."""


@dataclass
class Run:
    """What one rank wrote, from its last start on."""

    path: str
    first: dict[str, Any] = field(default_factory=dict)  # the line that it began with
    lines: list[dict[str, Any]] = field(default_factory=list)  # those after it

    @property
    def rank(self) -> int:
        """Of this process; 0 where there is only one."""
        return int(self.first.get("rank") or 0)

    @property
    def ranks(self) -> int:
        """How many there are."""
        return int(self.first.get("ranks") or 1)

    @property
    def alarms(self) -> list[dict[str, Any]]:
        """Those lines."""
        return [each for each in self.lines if is_alarm(each)]

    def is_with(self, other: Run) -> bool:
        """Whether both are of one run: started as one job at about one time."""
        if self.first.get("run") != other.first.get("run"):
            return False
        began = [_time(each.first.get("time")) for each in (self, other)]
        return None in began or abs(began[0] - began[1]) < _SECONDS  # type: ignore[operator]  # no None


def is_alarm(line: dict[str, Any]) -> bool:
    """Whether a line is an alarm's."""
    return "alarm" in line or line.get("kind") == "alarm"


def of_rank(path: str | os.PathLike[str], rank: int) -> str:
    """Returns the path of another rank's file: run.jsonl -> run.rank1.jsonl; of rank zero the path itself."""
    root, extension = os.path.splitext(os.fspath(path))
    root = re.sub(r"\.rank\d+$", "", root)
    return f"{root}.rank{rank}{extension}" if rank else f"{root}{extension}"


def beside(path: str | os.PathLike[str]) -> list[str]:
    """Returns the files of other ranks that are there."""
    zero = of_rank(path, 0)
    root, extension = os.path.splitext(zero)
    found = glob.glob(f"{glob.escape(root)}.rank*{glob.escape(extension)}")
    found = [each for each in found if re.search(r"\.rank\d+$", os.path.splitext(each)[0])]
    return [each for each in (zero, *sorted(found)) if each != os.fspath(path) and os.path.exists(each)]


def read(path: str) -> list[dict[str, Any]]:
    """Returns the lines of a file; a last one that an interruption cut off is left out.

    Raises:
        ValueError: it is no file of `precision watch`.
        OSError: it cannot be read.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line) if line.strip() else {}
        except ValueError:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: expected JSON as `precision_lab.watch` writes it") from None
        if not isinstance(value, dict):
            raise ValueError(f"{path}, line {number}: expected an object as `precision_lab.watch` writes it")
        found.append(value)
    if not any("step" in each or "watch" in each for each in found):
        raise ValueError(f"{path}: no line has a step: expected a file that `precision_lab.watch(..., file=...)` wrote")
    return found


def runs_of(path: str) -> list[Run]:
    """Returns the last run of each rank that a file has: one, or several where files were put together."""
    found: dict[int, Run] = {}
    run = Run(path)
    for line in read(path):
        if "watch" in line:
            run = Run(path, line)
        else:
            run.lines.append(line)
        found[run.rank] = run
    return list(found.values())


def all_of(paths: Sequence[str]) -> list[Run]:
    """Returns the last runs of all ranks, in their order: of the files, and of those beside the first that fit it."""
    runs = {run.rank: run for path in paths for run in runs_of(path)}
    given = {os.path.abspath(each) for each in paths}
    main = next(iter(runs.values()))
    for path in beside(paths[0]):
        if os.path.abspath(path) not in given:
            runs |= {run.rank: run for run in runs_of(path) if run.is_with(main) and run.rank not in runs}
    return [runs[rank] for rank in sorted(runs)]


def _time(text: object) -> float | None:
    try:
        return datetime.strptime(str(text), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return None
