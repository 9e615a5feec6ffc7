"""The comparison: a child process a mode, all alive at once, a few steps each in turn; and their rows filled in.

On a machine that does other things too, times of modes that run one after another are not to be compared: the machine
is another one meanwhile. In turns of a fraction of a second, what slows one mode down slows its neighbours as well, and
the ratio within a round stays. Rounds go back and forth, so that a machine that slows down steadily favours nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from precision_lab.interrupts import Interrupts
from precision_lab.loop import Job
from precision_lab.memory import explain_full
from precision_lab.process import Child, ChildFailed
from precision_lab.progress import Progress
from precision_lab.results import WARM_UP, Comparison, Row, Status
from precision_lab.resume import Saved

_FIGURES = {f.name for f in fields(Row)} - {"mode", "seed", "repeat"}
TURN = 0.25
"""Seconds that the slowest mode's turn is to take: long against a switch between processes, short against what else
a machine does."""
SHORTEST, LONGEST = 3, 50
"""Steps of a turn: the median of three forgives one that was interrupted."""
SAVE_EVERY = 60.0
"""Seconds between two savings, at least; and saving takes a twentieth of the time at most."""


class Trains(Protocol):
    """What `Child` is."""

    def tell(self, command: str) -> None: ...
    def events(self, until: str | None = None) -> Iterator[dict[str, Any]]: ...
    def close(self) -> None: ...


Start = Callable[[Job, bool], Trains]


@dataclass
class _Lane:
    """A row and the child that fills it."""

    row: Row
    child: Trains
    alone: bool


def run(
    comparison: Comparison,
    accelerator: str,
    progress: Progress,
    devices: int = 1,
    start: Start = Child,
    *,
    sequential: bool = False,
    saved: Saved | None = None,
) -> None:
    """Trains the mode of each row without a `reason`, and fills the row in; after a failure the others go on.

    Several processes a mode, or `sequential`: one mode after another. One that runs out of memory beside the others is
    tried again alone. Runs of other seeds, of which no time counts,
    always are; those of a mode that did not finish are left out.

    Raises:
        TaskError: the user's file raised before the training, as it would for all of them.
        KeyboardInterrupt: Ctrl-C; with `saved`, what was trained is on disk.
    """
    runner = _Runner(comparison, accelerator, progress, devices, start, saved)
    rows = [row for row in comparison.rows if not row.reason and row.status != "done"]
    in_turns = devices == 1 and not sequential
    for group in [rows] if in_turns else [[row] for row in rows]:
        runner.run(group, in_turns)
    for row in runner.crowded:
        row.status, row.reason, row.losses, row.step_seconds = "not run", "", [], []
        comparison.tracebacks.pop(row.mode, None)
        row.note = "; ".join(filter(None, [row.note, "trained alone, there was no memory for all modes at once"]))
        runner.run([row], in_turns=False)
    for row in comparison.repeats:
        if row.status == "done":
            continue
        if comparison.find(row.mode) or row.mode not in {first.mode for first in comparison.rows}:
            runner.run([row], in_turns=False)
        else:
            row.reason = f"{row.mode} did not finish with the first seed"


class _Runner:
    def __init__(
        self,
        comparison: Comparison,
        accelerator: str,
        progress: Progress,
        devices: int,
        start: Start,
        saved: Saved | None,
    ) -> None:
        self._comparison, self._progress, self._start, self._saved = comparison, progress, start, saved
        self._accelerator, self._devices = accelerator, devices
        self._lanes: list[_Lane] = []
        self.crowded: list[Row] = []
        """Those that ran out of memory while others were in it."""
        self._interrupts = Interrupts()
        self._told = devices == 1
        self._next_save = time.monotonic() + SAVE_EVERY

    def run(self, rows: Sequence[Row], in_turns: bool) -> None:
        self._lanes = []
        try:
            for row in rows:  # all start at once, and are waited for in order
                self._progress.start(row)
                child = self._start(self._job(row), self._told)
                self._lanes.append(_Lane(row, child, alone=len(rows) == 1))
            for lane in list(self._lanes):
                self._await(lane, "ready" if self._told else None)
            if self._told:
                self._train_and_save(in_turns)
            for lane in list(self._lanes):
                self._end(lane)
        finally:
            for lane in self._lanes:
                lane.child.close()

    def _train_and_save(self, in_turns: bool) -> None:
        try:
            with self._interrupts:
                self._train(in_turns)
            for lane in list(self._lanes):
                self._tell(lane, "finish", "finished")  # and then it is ended: leaving takes Python a second
                self._end(lane)
        except KeyboardInterrupt:
            self._save()
            raise

    def _job(self, row: Row) -> Job:
        compared = self._comparison
        resume = "" if self._saved is None else self._saved.checkpoint_of(row)
        return Job(
            row.mode,
            compared.steps,
            row.seed,
            self._accelerator,
            self._devices,
            compared.strategy,
            compared.task,
            compared.size,
            resume,
            compared.look,
        )

    def _train(self, in_turns: bool) -> None:
        rounds = 0
        while waiting := [lane for lane in self._lanes if len(lane.row.losses) < self._comparison.steps]:
            done = min(len(lane.row.losses) for lane in waiting)
            steps = WARM_UP if done < WARM_UP else self._block(waiting, in_turns)
            for lane in reversed(waiting) if rounds % 2 else waiting:
                with self._interrupts.held_back():
                    self._tell(lane, f"steps {steps}", "paused")
            rounds += 1
            if self._saved is not None and time.monotonic() > self._next_save:
                self._save()

    def _block(self, lanes: Sequence[_Lane], in_turns: bool) -> int:
        """Returns how many steps a turn has: once the modes have warmed up, always as many."""
        if in_turns and self._comparison.block is not None:
            return self._comparison.block
        slowest = max(lane.row.step_seconds[-1] for lane in lanes)
        rest = self._comparison.steps - WARM_UP
        block = max(SHORTEST, min(LONGEST, rest, round(TURN / max(slowest, 1e-6))))
        if in_turns:
            self._comparison.block = block
        return block

    def _tell(self, lane: _Lane, command: str, until: str | None) -> None:
        lane.child.tell(command)
        self._await(lane, until)

    def _await(self, lane: _Lane, until: str | None) -> None:
        if lane not in self._lanes:
            return
        try:
            for event in lane.child.events(until):
                _take(event, lane.row, self._comparison)
                self._progress.update(lane.row)
        except ChildFailed as failure:
            row = lane.row
            if row.held_out_loss is not None:  # it trained; what failed is the look at its layers
                row.no_noise = str(failure)
                self._end(lane)
            elif row.reason:  # the task does not go with the mode
                self._end(lane, "failed" if self._comparison.named else "not run")
            else:
                row.reason, is_full = explain_full(str(failure))
                if is_full and not lane.alone:
                    row.reason += "; it is tried again alone"
                    self.crowded.append(row)
                self._end(lane, "failed")

    def _end(self, lane: _Lane, status: Status = "done") -> None:
        if lane not in self._lanes:
            return
        lane.row.status = status
        self._lanes.remove(lane)
        lane.child.close()
        self._progress.end(lane.row)
        if self._saved is not None:
            self._saved.write(self._comparison)

    def _save(self) -> None:
        """Has every child save, between its turns, and writes down how far they are."""
        if self._saved is None or not self._told:
            return
        start = time.monotonic()
        for lane in list(self._lanes):
            try:
                lane.child.tell(f"save {self._saved.file_for(lane.row)}")
                for event in lane.child.events("saved"):
                    _take(event, lane.row, self._comparison)
                self._saved.has_saved(lane.row)
            except ChildFailed:
                continue  # it starts anew then
        self._saved.write(self._comparison)
        self._next_save = time.monotonic() + max(SAVE_EVERY, 20 * (time.monotonic() - start))


def _take(event: dict[str, Any], row: Row, comparison: Comparison) -> None:
    if "loss" in event:
        row.losses.append(event["loss"])
        row.step_seconds.append(event["seconds"])
    elif "traceback" in event:
        comparison.tracebacks[row.mode] = event["traceback"]
    elif "refused" in event:
        row.reason = event["refused"]
    elif "device" in event:
        comparison.environment = comparison.environment or event
    for name in event.keys() & _FIGURES:
        setattr(row, name, event[name])
