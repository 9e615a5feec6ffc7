"""The comparison: one child process a mode, one after another, and a row for each."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import fields
from typing import Any

from precision_core import Policy, Support, supports
from precision_core.support import is_core_mode, refusal, resolve_precision, resolve_strategy
from precision_lab.process import ChildFailed, run_child
from precision_lab.progress import Progress
from precision_lab.results import Comparison, Row, Status, spell
from precision_lab.train import Job

_FIGURES = {f.name for f in fields(Row)}

Runner = Callable[[Job], Generator[dict[str, Any], None, None]]
"""What trains in a process of its own, yields its events as they come, and raises `ChildFailed`: `run_child`."""


def make_rows(
    modes: Sequence[str], device_type: str, *, named: bool, run_slow: bool, strategy: str = "auto", devices: int = 1
) -> list[Row]:
    """Returns a row for each mode, as `parse_modes` returns them. Those with a reason are not to be run.

    Modes that the device is slow at are left out unless they were `named` or are to be run all the same. One that it
    cannot run at all, or not under that strategy, has failed when it was asked for by name.
    """
    rows = []
    for mode in modes:
        policy = spell(Policy.parse(mode)) if is_core_mode(mode) else None
        answer = _supports(mode, device_type, strategy)
        if answer and (refused := refusal_of(mode, device_type, strategy, devices)):
            answer = Support("no", refused)
        status: Status = "failed" if named and not answer else "not run"
        reasons = {"slow": "" if named or run_slow else f"{answer.reason}; --all runs it", "no": answer.reason}
        rows.append(Row(mode, status, reasons.get(answer.level, ""), policy=policy))
    return rows


def _supports(mode: str, device_type: str, strategy: str) -> Support:
    try:
        return supports(mode, device_type, strategy)
    except ImportError as error:  # some package's rows cannot be read: if it matters, the run itself will say so
        return Support("native", str(error))


def refusal_of(mode: str, device_type: str, strategy: str, devices: int) -> str | None:
    """Returns why a strategy that was asked for does not run `mode`; None: it does, as far as its construction tells.

    Raises:
        ValueError: it does not run on the device at all, or not in so many processes.
        ImportError: the package that brings it cannot be imported.
    """
    if strategy == "auto":  # those of core, which run all of its modes
        return None
    under, _ = resolve_strategy(strategy, device_type, devices, 1)
    try:
        return refusal(resolve_precision(mode, under), under)
    except ValueError as error:
        return str(error)
    except ImportError:  # of the package that brings the mode: as above
        return None


def run(
    comparison: Comparison, accelerator: str, progress: Progress, devices: int = 1, runner: Runner = run_child
) -> None:
    """Runs every row that has no reason not to be run, and fills it in. One that fails leaves the others alone."""
    for row in comparison.rows:
        if row.reason:
            continue
        progress.start(row)
        try:
            job = Job(row.mode, comparison.steps, comparison.seed, accelerator, devices, comparison.strategy)
            with closing(runner(job)) as events:
                for event in events:
                    _take(event, row, comparison)
                    progress.update(row)
            row.status = "done"
        except ChildFailed as failure:
            row.status, row.reason = "failed", str(failure)
        progress.end(row)


def _take(event: dict[str, Any], row: Row, comparison: Comparison) -> None:
    if "loss" in event:
        row.losses.append(event["loss"])
        row.step_seconds.append(event["seconds"])
    elif "device" in event:
        comparison.environment = comparison.environment or event
    for name in event.keys() & _FIGURES:
        setattr(row, name, event[name])
