"""The runs of a choice: a race of all modes side by side, then single runs of a mode, seed after seed.

Nothing is trained twice: what is done lies in a folder until the choice is made (see `resume`), and whoever asks for
it again gets it from there.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from precision_lab import turns
from precision_lab.footprint import Footprint
from precision_lab.loop import Job
from precision_lab.process import ChildFailed
from precision_lab.progress import Bars, Progress
from precision_lab.results import BASELINE, Comparison, Row
from precision_lab.resume import Saved, digest
from precision_lab.sensitivity import Layer
from precision_lab.turns import Start


@dataclass
class Runs:
    """Trains modes of one task.

    Args:
        task: the user's, task.py:make, or the name of a function; "": the built-in GPT.
        start: what makes a child process for a job.
        folder: where runs that are done, and checkpoints of those under way, lie; None: nowhere.
    """

    task: str
    size: str
    accelerator: str
    start: Start
    console: Console
    folder: Path | None = None
    sequential: bool = False
    environment: dict[str, Any] = field(default_factory=dict)
    """What the first child said of device, versions and model."""
    tracebacks: dict[str, str] = field(default_factory=dict)
    _done: dict[tuple[str, int], list[Row]] = field(default_factory=dict)

    def race(self, modes: Sequence[str], steps: int, seeds: Sequence[int]) -> Comparison:
        """Trains all modes side by side with the first of the seeds, then each that finished with the others."""
        rows = [Row(mode, seed=seeds[0]) for mode in modes]
        repeats = [Row(mode, seed=seed, repeat=True) for mode in modes for seed in seeds[1:]]
        return self._run(Comparison(steps, seeds[0], rows, "auto", self.task, self.size, repeats, look="updates"))

    def single(self, mode: str, steps: int, seeds: Sequence[int]) -> list[Row]:
        """Trains a mode with some seeds, one after another; returns their rows up to the first that fails."""
        done = self._done.setdefault((mode, steps), [])
        for seed in seeds[len(done) :]:
            if done and done[-1].status != "done":
                break
            rows = [*done, Row(mode, seed=seed, repeat=True)]
            self._run(Comparison(steps, seed, [], "auto", self.task, self.size, rows, look="updates"), mode)
            done.append(rows[-1])
        return done[: len(seeds)]

    def known(self, mode: str, steps: int) -> list[Row]:
        """Returns all rows of `single` that finished."""
        return [row for row in self._done.get((mode, steps), []) if row.status == "done"]

    def estimate(self, modes: Sequence[str]) -> list[Footprint]:
        """Returns the memory of a step in each mode; those that cannot be estimated have a reason.

        A child does it: what the user's code keeps from tensors without values must not reach a run.
        """
        job = Job(BASELINE, 1, 0, self.accelerator, task=self.task, size=self.size, look="")
        found: list[Footprint] = []
        try:
            with closing(self.start(job, True)) as child:
                list(child.events("ready"))
                for mode in modes:
                    child.tell(f"estimate {mode}")
                    found += [Footprint(**event["footprint"]) for event in child.events("footprint")]
        except ChildFailed as failure:
            found += [Footprint(mode, reason=str(failure)) for mode in modes[len(found) :]]
        return found

    def look(self, steps: int, seed: int) -> list[Layer]:
        """Returns each layer's sensitivity, from a float64 run.

        Raises:
            ChildFailed: there is no float64 here, or it raised.
        """
        job = Job("64-true", steps, seed, self.accelerator, task=self.task, size=self.size, look="")
        with closing(self.start(job, True)) as child:
            list(child.events("ready"))
            child.tell("look")
            for event in child.events("sensitivity"):
                if "sensitivity" in event:
                    return [Layer(**layer) for layer in event["sensitivity"]]
        return []

    def clear(self) -> None:
        """Deletes what was kept: the choice is made, or is to start anew."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def there(self) -> bool:
        """Whether an interrupted choice has left something."""
        return self.folder is not None and any(self.folder.glob("*/resume/resume.json"))

    def _run(self, comparison: Comparison, what: str = "race") -> Comparison:
        saved = None
        if self.folder is not None:
            name = hashlib.sha256(f"{what} {comparison.steps}".encode()).hexdigest()[:12]
            saved = Saved(self.folder / name, self._options(comparison, what))
            saved.read(comparison)
        rows = [*comparison.rows, *comparison.repeats]
        if not comparison.environment:
            comparison.environment = dict(self.environment)
        with self._progress(rows, comparison.steps) as progress:
            turns.run(comparison, self.accelerator, progress, 1, self.start, sequential=self.sequential, saved=saved)
        self.environment = self.environment or comparison.environment
        self.tracebacks |= comparison.tracebacks
        return comparison

    def _progress(self, rows: Sequence[Row], steps: int) -> Bars | Ends:
        return Bars(self.console, rows, steps) if self.console.is_terminal else Ends(self.console)

    def _options(self, comparison: Comparison, what: str) -> dict[str, Any]:
        modes = [row.mode for row in comparison.rows]
        file = self.task.rpartition(":")[0] or self.task
        return {
            "what": what,
            "steps": comparison.steps,
            "modes": modes,
            "task": digest(file) or self.task,
            "size": self.size,
            "accelerator": self.accelerator,
        }


class Ends:
    """Progress in a log: a line for each run that has ended."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        pass

    def start(self, row: Row) -> None:
        pass

    def update(self, row: Row) -> None:
        pass

    def end(self, row: Row) -> None:
        found = row.reason if row.held_out_loss is None else f"held-out {row.held_out_loss:.5g}"
        text = f"  {row.mode}, seed {row.seed}, {len(row.losses)} steps: {found}"
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
