"""What the commands do, as functions that return plain objects, for scripts and notebooks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from rich.console import Console

from precision_core import Fabric
from precision_lab import turns
from precision_lab.modes import modes_to_compare
from precision_lab.process import Child, Fork
from precision_lab.progress import make_progress
from precision_lab.results import BASELINE, Comparison, Row
from precision_lab.resume import Saved, digest
from precision_lab.rows import ask_for_rows
from precision_lab.taskfile import check_spec, guarded
from precision_lab.train import SIZES, settings
from precision_lab.turns import Start

SEEDS = 3
"""Of 32-true, where nothing else is said."""


def compare(
    task: str | PathLike[str] | Callable[[], Any] | None = None,
    modes: str | Sequence[str] | None = None,
    *,
    steps: int = 300,
    seed: int = 0,
    seeds: int | None = None,
    size: str = "1m",
    accelerator: str = "auto",
    devices: int = 1,
    strategy: str = "auto",
    run_slow: bool = False,
    sequential: bool = False,
    out: str | PathLike[str] | None = None,
    console: Console | None = None,
) -> Comparison:
    """Trains a task in each mode from the same start, and returns the rows, with a verdict.

    Args:
        task: "task.py:make", or the function itself, which then runs in forks of this process; None: the built-in GPT.
        modes: a list, or its text, or "all"; None: core's. Modes that are named run even where they are slow. A mode
            may have variants, which change the task: "nf4+lora".
        seeds: train every mode with so many seeds; None: 32-true with 3, the others with one.
        size: of the GPT: "1m", "25m", "85m", "300m", "1b" parameters.
        sequential: one mode after another, where all do not fit into memory at once.
        out: a folder for compare.json, compare.png and report.html; an interrupted run goes on from it. None: no files.

    Raises:
        ValueError: an unknown mode, device, strategy or size, or no such file.
        TaskError: the user's code raised before any training; holds the user's traceback.
        RuntimeError: a function as `task`, in a process that uses CUDA already.
    """
    named = modes not in (None, "all")
    text = modes if modes is None or isinstance(modes, str) else ",".join(modes)
    comparison = prepare(
        task if task is None or callable(task) else str(task),
        modes_to_compare(None if text is None else str(text)),
        named=named,
        steps=steps,
        seed=seed,
        seeds=seeds,
        size=size,
        accelerator=accelerator,
        devices=devices,
        strategy=strategy,
        run_slow=run_slow,
    )
    start: Start = Child
    if callable(task):
        make = guarded(task)
        start = lambda job, told: Fork(job, make, told)  # noqa: E731
    folder = None if out is None else Path(out)
    execute(comparison, accelerator, devices, console or Console(), folder, sequential=sequential, start=start)
    return comparison


def prepare(
    task: str | Callable[[], Any] | None,
    modes: Sequence[str],
    *,
    named: bool,
    steps: int,
    seed: int,
    seeds: int | None,
    size: str,
    accelerator: str,
    devices: int,
    strategy: str,
    run_slow: bool,
) -> Comparison:
    """Returns the comparison with a row for each run, nothing trained.

    Raises:
        ValueError: an unknown device, strategy or size, or no such file.
        ChildFailed: a GPU could not be asked.
    """
    if size not in SIZES:
        raise ValueError(f"size {size!r}: expected one of {', '.join(SIZES)}")
    if isinstance(task, str):
        check_spec(task)
    device_type = Fabric(accelerator=accelerator).device.type
    rows = ask_for_rows(modes, device_type, named=named, run_slow=run_slow, strategy=strategy, devices=devices)
    for row in rows:
        row.seed = seed
    repeated = [row for row in rows if not row.reason and (seeds is not None or row.mode == BASELINE)]
    more = [seed + n for n in range(1, SEEDS if seeds is None else seeds)]
    repeats = [Row(row.mode, policy=row.policy, seed=other, repeat=True) for row in repeated for other in more]
    name = getattr(task, "__name__", "make") if callable(task) else task or ""
    return Comparison(steps, seed, rows, strategy, name, size, repeats, named=named)


def execute(
    comparison: Comparison,
    accelerator: str,
    devices: int,
    console: Console,
    folder: Path | None,
    *,
    sequential: bool = False,
    fresh: bool = False,
    start: Start | None = None,
) -> None:
    """Runs what `prepare` returned, fills it in, and writes its files into `folder`."""
    saved = None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        saved = Saved(folder, _options(comparison, accelerator, devices))
        if fresh:
            saved.clear()
        if said := saved.read(comparison):
            console.print(said)
    rows = [*comparison.rows, *comparison.repeats]
    try:
        with make_progress(console, rows, comparison.steps) as progress:
            turns.run(comparison, accelerator, progress, devices, start or Child, sequential=sequential, saved=saved)
    except KeyboardInterrupt:
        if saved is not None and saved.there:
            console.print("interrupted: the same command goes on from here", markup=False)
        raise
    if folder is not None and saved is not None:
        write(comparison, folder)
        saved.clear()


def write(comparison: Comparison, folder: Path) -> None:
    """Writes compare.json, compare.png and report.html."""
    from precision_lab.plot import save_plot
    from precision_lab.report import save_report

    record = comparison.as_dict(None if comparison.task else settings())
    (folder / "compare.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    save_plot(comparison, folder / "compare.png")
    save_report(comparison, folder / "report.html")


def _options(comparison: Comparison, accelerator: str, devices: int) -> dict[str, Any]:
    return {
        "steps": comparison.steps,
        "seed": comparison.seed,
        "modes": [row.mode for row in comparison.rows],
        "seeds": sorted({row.label for row in comparison.repeats}),
        "strategy": comparison.strategy,
        "task": digest(comparison.task.rpartition(":")[0] or comparison.task) or comparison.task,
        "size": comparison.size,
        "accelerator": accelerator,
        "devices": devices,
    }
