"""`precision choose`: the cheapest precision whose training stays within 32-true's spread over seeds.

1. candidates   what runs here (`supports`), with the bytes that `estimate` says, within the user's budget
2. sensitivity  one float64 step: where a format rounds, overflows, swallows updates (sensitivity.py)
3. race         all of them, short and side by side: what fails is out, what is slow is known
4. judgement    from the cheapest on, with fresh seeds and all of the steps, until one is safe (evidence.py);
                one that is not gets exceptions where the sensitivity says so (exceptions.py), and comes again

Undecided is not safe. 32-true, which everything is measured by, is the answer when nothing cheaper is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console

from precision_core import Fabric
from precision_core.support import machine_fingerprint
from precision_lab.choice import Choice
from precision_lab.contest import Contest
from precision_lab.estimates import parse_bytes
from precision_lab.evidence import LOOKS
from precision_lab.modes import modes_to_run, parse_modes
from precision_lab.process import Child, Fork
from precision_lab.rows import ask_for_rows
from precision_lab.runs import Runs
from precision_lab.taskfile import check_spec, guarded
from precision_lab.train import SIZES
from precision_lab.turns import Start

Prefer = Literal["memory", "speed"]

RACE = 4
"""The race has so many times fewer steps than training."""
SHORTEST = 20
"""Steps of a race."""


def choose(
    task: str | PathLike[str] | Callable[[], Any] | None = None,
    modes: str | Sequence[str] | None = None,
    *,
    fit: str | int | None = None,
    prefer: Prefer = "memory",
    steps: int = 300,
    seed: int = 0,
    seeds: int = LOOKS[-1],
    size: str = "1m",
    accelerator: str = "auto",
    run_slow: bool = False,
    sequential: bool = False,
    out: str | PathLike[str] | None = None,
    fresh: bool = False,
    console: Console | None = None,
) -> Choice:
    """Trains a task in several precisions, and returns the cheapest one that is as good as 32-true.

    Args:
        task, modes, size, accelerator, run_slow, sequential: as for `compare`.
        fit: what there is room for, "24GB" or bytes.
        prefer: what is to be saved, "memory" (the estimated peak of a step) or "speed" (the time of a step).
        steps: of the training that is judged: as many as yours has, or as you can wait for.
        seeds: the most seeds that a mode is judged with, 5 or more.
        out: a precision.json to write, for `Fabric(precision="auto")`; a task that is a file goes on from what an
            interrupted run left beside it, unless `fresh`. None: no files.

    Raises:
        ValueError: an unknown mode, device, size or amount of memory, or no such file.
        TaskError: the user's code raised before any training.
    """
    if prefer not in get_args(Prefer):
        raise ValueError(f"prefer={prefer!r}: expected one of {', '.join(get_args(Prefer))}")
    if seeds < LOOKS[1]:
        raise ValueError(f"seeds={seeds}: fewer than {LOOKS[1]} tell nothing apart")
    if size not in SIZES:
        raise ValueError(f"size {size!r}: expected one of {', '.join(SIZES)}")
    spec = "" if task is None or callable(task) else str(task)
    if spec:
        check_spec(spec)
    room = None if fit is None else parse_bytes(fit)
    device_type = Fabric(accelerator=accelerator).device.type
    named = modes not in (None, "all")
    text = modes if modes is None or isinstance(modes, str) else ",".join(modes)
    listed = parse_modes(str(text)) if named else modes_to_run(None if text is None else str(text))
    rows = ask_for_rows(listed, device_type, named=named, run_slow=run_slow, strategy="auto", devices=1)
    start: Start = Child
    if callable(task):
        make = guarded(task)
        start = lambda job, told: Fork(job, make, told)  # noqa: E731
    folder = None if out is None or callable(task) else Path(f"{Path(out)}.runs")
    name = getattr(task, "__name__", "make") if callable(task) else spec
    runs = Runs(name, size, accelerator, start, console or Console(), folder, sequential)
    if fresh:
        runs.clear()
    elif runs.there:
        runs.console.print("going on where it was interrupted", highlight=False)
    race_steps = min(steps, max(SHORTEST, steps // RACE))
    again = f"precision_lab.choose({name}, steps={steps})" if callable(task) else f"precision choose {spec}".strip()
    again += "" if callable(task) else f" --steps {steps}"
    choice = Choice("", [], steps, race_steps, prefer, room, machine=machine_fingerprint(device_type), command=again)
    limit = max(look for look in LOOKS if look <= seeds)
    try:
        Contest(choice, runs, seed, limit).run(rows)
    except KeyboardInterrupt:
        if runs.there:
            runs.console.print("interrupted: the same command goes on from here", highlight=False)
        raise
    choice.tracebacks = runs.tracebacks
    if out is not None and choice.precision:
        choice.write(out)
    runs.clear()
    return choice
