"""Progress while modes train: bars on a terminal, a line for every tenth of the steps in a log."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

import rich.progress
from rich.console import Console
from rich.markup import escape
from rich.table import Column

from precision_lab.results import Row


class Progress(Protocol):
    """Told of each row as it starts, after each of its steps, and when it ends. A context manager."""

    def start(self, row: Row) -> None: ...
    def update(self, row: Row) -> None: ...
    def end(self, row: Row) -> None: ...


class Bars:
    """A bar for each mode."""

    def __init__(self, console: Console, rows: Sequence[Row], steps: int) -> None:
        self._bars = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}", table_column=Column(max_width=30, no_wrap=True)),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[note]}"),
            rich.progress.TimeElapsedColumn(),
            console=console,
            refresh_per_second=4,  # two cores train meanwhile
        )
        self._tasks = {
            row.label: self._bars.add_task(
                escape(row.label),
                start=False,
                total=steps,
                completed=len(row.losses),
                note="done" if row.status == "done" else "waits",
            )
            for row in rows
            if not row.reason
        }

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bars.stop()

    def start(self, row: Row) -> None:
        task = self._tasks[row.label]
        self._bars.start_task(task)
        self._bars.update(task, note="starts")

    def update(self, row: Row) -> None:
        note = f"loss {row.losses[-1]:.3f}" if row.losses else "starts"
        self._bars.update(self._tasks[row.label], completed=len(row.losses), note=note)

    def end(self, row: Row) -> None:
        task = self._tasks[row.label]
        if row.status == "failed":
            self._bars.update(task, note="[red]failed")
        self._bars.stop_task(task)


class Lines:
    """A line at the start, after every tenth of the steps, and at the end of each mode; those of several mix."""

    def __init__(self, console: Console, rows: Sequence[Row], steps: int) -> None:
        self._console = console
        self._steps = steps
        self._width = min(30, max((len(row.label) for row in rows), default=0))
        self._marks = {max(1, steps * tenth // 10) for tenth in range(1, 11)}
        self._started: dict[str, float] = {}
        self._printed: dict[str, int] = {}

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        pass

    def start(self, row: Row) -> None:
        self._started[row.label] = time.perf_counter()
        self._printed[row.label] = len(row.losses)  # of a run that goes on
        self._print(row, "starts")

    def update(self, row: Row) -> None:
        step = len(row.losses)
        if step in self._marks and step > self._printed[row.label]:  # an event without a new step comes too
            self._printed[row.label] = step
            self._print(row, f"step {step:>{len(str(self._steps))}}/{self._steps}  loss {row.losses[-1]:.3f}")

    def end(self, row: Row) -> None:
        self._print(row, f"{row.status}{': ' if row.reason else ''}{row.reason}")

    def _print(self, row: Row, text: str) -> None:
        seconds = time.perf_counter() - self._started[row.label]
        self._console.print(f"{row.label:<{self._width}}  {seconds:5.1f} s  {text}", markup=False, soft_wrap=True)


def make_progress(console: Console, rows: Sequence[Row], steps: int) -> Bars | Lines:
    """Returns bars for a terminal, lines for a file or a pipe."""
    return (Bars if console.is_terminal else Lines)(console, rows, steps)
