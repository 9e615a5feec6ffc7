"""What a child process does: one training run, its figures as JSON lines, by choice a few steps whenever it is told to.

Told by lines: "steps 4" trains for four and ends with {"paused": step}, "save FILE" with {"saved": FILE}, "finish" with
the rest of the figures, "look" with {"sensitivity": [...]} of a float64 run's layers, "estimate MODE" with
{"footprint": {...}}. Once it is set up it says
{"ready": step}. The end of the lines ends the process: its parent is gone.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, TextIO

import torch

from precision_lab.loop import Job, Refused, Training
from precision_lab.task import Task
from precision_lab.taskfile import TaskError, users_traceback

Prepare = Callable[[torch.device], Callable[[], Task]]


def serve(job: Job, prepare: Prepare, lines: TextIO, told: int | None = None) -> None:
    """Trains and writes events to `lines`; `told` is the descriptor that commands come from, None: all at once.

    Raises:
        Exception: whatever the training raised, once the user's traceback is written, where it is the user's code.
    """
    torch.use_deterministic_algorithms(True)  # for the whole process, which is ours
    # Nothing here reads memory before it writes it, and engines allocate gigabytes that they use little of.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if told is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal's processes: the parent decides
    commands = iter(["steps", "finish"]) if told is None else commands_from(told)
    for event in _reported(job, prepare, commands):
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(event, allow_nan=False), file=lines, flush=True)


def _reported(job: Job, prepare: Prepare, commands: Iterator[str]) -> Iterator[dict[str, Any]]:
    try:
        yield from _events(Training(job, prepare), prepare, commands)
    except TaskError as error:
        yield {"task_error": str(error)}
        raise
    except Refused as error:
        yield {"refused": " ".join(str(error).split())}
        raise
    except Exception as error:
        if job.task:
            yield {"traceback": users_traceback(error)}
        raise


def _events(training: Training, prepare: Prepare, commands: Iterator[str]) -> Iterator[dict[str, Any]]:
    yield from training.start()
    yield {"ready": training.step}
    for command in commands:
        verb, _, argument = command.partition(" ")
        if verb == "steps":
            yield from training.advance(int(argument or training.job.steps))
            yield {"paused": training.step}
        elif verb == "look":
            from precision_lab.sensitivity import look

            yield {"sensitivity": look(training)}
        elif verb == "estimate":
            from precision_lab.estimates import traced

            yield {"footprint": asdict(traced(argument, prepare(torch.device("cpu"))))}
        elif verb == "save":
            training.save(argument)
            yield {"saved": argument}
        else:
            yield from training.finish()
            yield {"finished": True}
            return


def commands_from(descriptor: int) -> Iterator[str]:
    """Yields lines as they come; when they end, this process does, whatever it is doing."""
    commands: queue.Queue[str] = queue.Queue()

    def read() -> None:
        text = b""
        while received := os.read(descriptor, 4096):
            *complete, text = (text + received).split(b"\n")
            for line in complete:
                commands.put(line.decode())
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield commands.get()


def exit_with_parent() -> None:
    """Ends this process when its parent does, however that died: the system then closes the pipe to our stdin."""

    def wait() -> None:
        while os.read(0, 1):  # os.read: a thread that waits in sys.stdin would block the interpreter's exit
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
