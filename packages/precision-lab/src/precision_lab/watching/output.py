"""Where everything that is heard goes: the file, boards, the log, the user's own function."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch

from precision_lab.explaining.files import Run, beside, of_rank, runs_of
from precision_lab.explaining.ranks import First, first_rank
from precision_lab.watching.alarms import Alarm
from precision_lab.watching.boards import Board
from precision_lab.watching.lines import Lines

_log = logging.getLogger("precision_lab.watch")


class Output:
    """Rank zero writes all. Other ranks write alarms alone, into a file of their own that is not there without one."""

    def __init__(
        self, path: str | os.PathLike[str], boards: list[Board], on_alarm: Callable[[Alarm], object] | None
    ) -> None:
        self.alarms: list[Alarm] = []
        self.findings: list[dict[str, Any]] = []
        self.rank, self.ranks = ranks()
        self._lines = Lines(path if self.rank == 0 else of_rank(path, self.rank))
        self._boards, self._on_alarm = boards if self.rank == 0 else [], on_alarm
        self._run: dict[str, Any] = {}

    @property
    def path(self) -> str:
        """The file."""
        return str(self._lines.path)

    def run(self, line: dict[str, Any]) -> None:
        """Takes the first line. A path that cannot be written to is an error now."""
        self._run = line
        if self.rank == 0:
            self._lines.write(line, flush=True)

    def step(self, line: dict[str, Any]) -> None:
        """Takes a step's line."""
        if self.rank == 0:
            self._lines.write(line)
        for board in self._boards:
            board.step(line)

    def sample(self, line: dict[str, Any]) -> None:
        """Takes a sample's line."""
        if self.rank == 0:
            self._lines.write(line)
        for board in self._boards:
            board.sample(line)

    def finding(self, line: dict[str, Any]) -> None:
        """Takes a finding's line."""
        self.findings.append(line)
        if self.rank == 0:
            self._lines.write(line, flush=True)
            remedies = [each["ours"] for each in line["explanation"]["remedies"]]
            _log.warning("step %d: %s Do: %s", line["at"], line["text"], " or ".join(remedies))

    def keep(self, line: dict[str, Any]) -> None:
        """Takes how many bytes are kept."""
        if self.rank == 0:
            self._lines.write(line)
        _log.info("kept before each step: %.1f MB", line["keep"] / 1e6)

    def alarm(self, alarm: Alarm) -> None:
        """Takes an alarm; what the user's function raises is raised."""
        self.alarms.append(alarm)
        if self.ranks > 1 and (first := self._first()) is not None and first.rank != self.rank:
            alarm.text += f"; before that, rank {first.rank} went wrong, in step {first.step}"
        if self.rank and len(self.alarms) == 1:
            self._lines.write(self._run)
        self._lines.write(alarm.as_dict(), flush=True)
        _log.warning("%s", alarm.text if not self.rank else f"rank {self.rank}: {alarm.text}")
        for board in self._boards:
            board.alarm(alarm)
        if self._on_alarm is not None:
            self._on_alarm(alarm)

    def end(self, line: dict[str, Any], unseen: list[str]) -> None:
        """Takes the last line, with what could not be seen, and closes."""
        if self.rank == 0:
            line = {**line, "alarms": len(self.alarms), "unseen": unseen}
            if self.ranks > 1 and (first := self._first()) is not None:
                line["first"] = first.as_dict()
                _log.warning("%s: %s", first.kind, first.text)
            self._lines.write(line)
        self._lines.close()
        for board in self._boards:
            board.close()

    def _first(self) -> First | None:
        """Returns which rank was first, by the files of the others: what they have written so far."""
        mine = Run(self.path, self._run)
        alarms = {self.rank: [alarm.as_dict() for alarm in self.alarms]}
        for path in beside(self.path):
            if path != of_rank(path, 0):  # rank zero's, which may be long; it looks at ours when it ends
                try:
                    alarms |= {run.rank: run.alarms for run in runs_of(path) if run.is_with(mine)}
                except (OSError, ValueError):  # another's, or one that is written just now
                    continue
        return first_rank(alarms, self.ranks)


def ranks() -> tuple[int, int]:
    """Returns this process's rank, and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
