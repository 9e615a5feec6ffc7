"""precision-lab: the `precision` command: which number formats run here, and what they do to training.

    cli.py        the command; commands/: each of its commands, and their options
    api.py        the same as functions that return plain objects

    doctor.py     precision doctor: everything that there is to say of this machine
    machine.py    its CPU and devices
    installed.py  packages, and what is wrong with them
    findings.py   all of it, printed

    task.py       what is trained, as the user's code makes it
    taskfile.py   the user's file, and its errors
    task_template.py  what `precision new` writes

    modes.py      precision compare --modes: which precisions to run
    rows.py       a row for each, and which of them run here
    turns.py      runs them side by side, a few steps each in turn, and fills the rows in
    process.py    one child process, and the lines it sends
    resume.py     what an interrupted comparison goes on from
    interrupts.py Ctrl-C between two turns
    progress.py   what is shown meanwhile, on a terminal and in a log
    results.py    a row, and what is computed from all of them
    verdict.py    which mode to take
    table.py      the table at the end
    shown.py      the same in notebooks
    against.py    the same beside an older record
    curves.py     curves as they are drawn
    plot.py       the picture
    report.py     the page, report.html; charts.py: its charts, report.css: its looks

    serve.py      what the child does, when it is told to
    loop.py       one training run in one precision
    probe.py      signal to noise of its layers
    train.py      from the command line; and the built-in task
    gpt.py        its model
    text.py       its text
    memory.py     what it took
    variants.py   changes of the task that a mode may come with; lora.py: adapters

    chooser.py    precision choose
    contest.py    its candidates: a race, a judgement, exceptions
    disqualified.py  what needs no judgement
    choice.py     what it found, and the file for Fabric(precision="auto")
    runs.py       its training runs, each done once
    evidence.py   whether some seeds say that a mode is safe
    sensitivity.py  what each module would lose in a narrower format
    exceptions.py which modules stay in float32 for that, and why
    updates.py    updates that round to nothing, counted while a run trains

    estimates.py  precision estimate: the memory of each mode, and whether it fits
    footprint.py  of one training step, by kind
    tracker.py    bytes of tensors that have no memory
    scratch.py    bytes that no operation shows
    made.py       the task, made without values
    buckets.py    DDP's; pretended.py: the other processes under FSDP2
    formulas.py   where an engine cannot be traced
    hf.py         the model of a config.json

    explaining/   precision why: the operation by which a step first goes wrong, and what mends it
    auditing/     precision audit: what a training loop of anybody's really computes and keeps
    watching/     precision watch: the same loop, always: alarms, and samples of what its formats do

Nothing is imported here before it is asked for, so that `precision --help` need not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from precision_lab.api import compare
    from precision_lab.auditing.context import audit
    from precision_lab.choice import Choice
    from precision_lab.chooser import choose
    from precision_lab.estimates import estimate
    from precision_lab.explaining.explain import explain
    from precision_lab.results import Comparison
    from precision_lab.task import Task
    from precision_lab.taskfile import TaskError
    from precision_lab.watching.context import watch

__all__ = ["Choice", "Comparison", "Task", "TaskError", "audit", "choose", "compare", "estimate", "explain", "watch"]

_HOMES = {
    "Choice": "choice",
    "Comparison": "results",
    "Task": "task",
    "TaskError": "taskfile",
    "audit": "auditing.context",
    "choose": "chooser",
    "compare": "api",
    "estimate": "estimates",
    "watch": "watching.context",
    "explain": "explaining.explain",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
