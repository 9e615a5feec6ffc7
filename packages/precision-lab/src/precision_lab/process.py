"""Child processes, and the lines they send.

Each mode trains in a fresh process: its memory starts at zero, nothing that a mode leaves behind (caches, autotuned
kernels, a crash) reaches the next one, and deterministic algorithms can be switched on for all of it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NoReturn

import torch

from precision_lab.loop import Job
from precision_lab.serve import serve
from precision_lab.task import Task
from precision_lab.taskfile import TaskError

_VENDORS = {
    # cuBLAS is deterministic only with a fixed workspace.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # OpenMP's threads spin while they wait for each other. With two threads on two cores a bf16-true step took 35 ms on
    # an idle machine and 1.5 s on a busy one; one thread takes 58 ms on both, and the same losses on any machine size.
    "OMP_NUM_THREADS": "1",
}
"""Environment variables that libraries read when they start. The user's own values take precedence."""


class ChildFailed(Exception):
    """The child ended before its work was done; the message is its last line of stderr, or the signal that ended it."""


class Child:
    """A training run in a process of its own (`python -m precision_lab.train`, by torchrun for several).

    It never outlives this object's `close`, nor this process: when that is killed, its end of the child's stdin closes.
    With `told`, it waits for `tell` (see `serve`); else it trains by itself.
    """

    def __init__(self, job: Job, told: bool = False) -> None:
        self._logs = tempfile.TemporaryDirectory()
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - `close` closes it
        self._start(job, told)

    def _start(self, job: Job, told: bool) -> None:
        self._child = subprocess.Popen(
            _command(job, self._logs.name, told),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=_VENDORS | os.environ,
        )
        assert self._child.stdin is not None and self._child.stdout is not None
        self._commands: IO[bytes] = self._child.stdin
        self._lines: IO[bytes] = self._child.stdout

    def tell(self, command: str) -> None:
        """Sends a command; one to a child that has ended is lost, and `events` say why it ended."""
        with suppress(BrokenPipeError):
            self._commands.write(f"{command}\n".encode())
            self._commands.flush()

    def events(self, until: str | None = None) -> Iterator[dict[str, Any]]:
        """Yields its events as they come: to the one with the key `until`, which is the last, or to the end.

        Raises:
            ChildFailed: with the last line of the child's traceback, or the signal that ended it.
            TaskError: the user's file raised before the training.
        """
        for line in self._lines:
            event = json.loads(line)
            if "task_error" in event:
                raise TaskError(event["task_error"])
            yield event
            if until is not None and until in event:
                return
        code = self._wait()
        if code or until is not None:
            self._errors.seek(0)
            raise ChildFailed(_reason(code, self._errors.read(), Path(self._logs.name)))

    def close(self) -> None:
        """Ends the process, if it has not ended, and waits for that."""
        self._kill()
        self._wait()
        for each in (self._commands, self._lines):
            with suppress(BrokenPipeError):  # a command that it never read
                each.close()
        self._errors.close()
        self._logs.cleanup()

    def _wait(self) -> int:
        return self._child.wait()

    def _kill(self) -> None:
        self._child.kill()  # does nothing when it has ended


class Fork(Child):
    """The same in a fork of this process, for a `make` that is no file's: a notebook's, say.

    Raises:
        RuntimeError: CUDA is in use in this process, which a fork cannot share.
    """

    _ends: tuple[int, ...] = ()
    """Our ends of the pipes of all forks: no other fork may hold them open."""

    def __init__(self, job: Job, make: Callable[[], Task], told: bool = False) -> None:
        if torch.cuda.is_initialized():
            raise RuntimeError(
                "this process uses CUDA already, which its forks cannot: put make() into a file and pass "
                '"task.py:make", or restart and compare first'
            )
        # torch imports it for deterministic algorithms, in seconds: once here, not in each fork.
        import_module("torch._inductor.config")
        self._make = make
        super().__init__(job, told)

    def _start(self, job: Job, told: bool) -> None:

        (commands, self._to), (self._from, lines) = os.pipe(), os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self._code: int | None = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forking where there are threads
            self._pid = os.fork()
        if not self._pid:
            for end in (*Fork._ends, self._to, self._from):
                os.close(end)
            self._run(job, commands if told else None, lines)
        os.close(commands)
        os.close(lines)
        Fork._ends += (self._to, self._from)
        self._commands, self._lines = os.fdopen(self._to, "wb"), os.fdopen(self._from, "rb")

    def _run(self, job: Job, told: int | None, lines: int) -> NoReturn:
        code = 1
        try:
            os.dup2(self._errors.fileno(), 2)
            os.dup2(2, 1)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
            stream = os.fdopen(lines, "w")  # kept: a warning that nobody closed it would be stderr's last line
            serve(job, lambda device: self._make, stream, told)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def close(self) -> None:
        super().close()
        Fork._ends = tuple(end for end in Fork._ends if end not in (self._to, self._from))

    def _wait(self) -> int:
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return self._code

    def _kill(self) -> None:
        if self._code is None:
            os.kill(self._pid, signal.SIGKILL)


def run_child(job: Job) -> Generator[dict[str, Any], None, None]:
    """Trains in a child and yields its events as they come; the child never outlives the generator: close it.

    Raises:
        ChildFailed, TaskError: as `Child.events`.
    """
    with closing(Child(job)) as child:
        yield from child.events()


def _command(job: Job, logs: str, told: bool) -> list[str]:
    command = [sys.executable, "-m"]
    if job.devices > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={job.devices}"]
        # each rank's stderr in a file of its own: in one stream their tracebacks mix
        command += ["--log-dir", logs, "--redirects", "2", "-m"]
    command += ["precision_lab.train", job.mode, "--told" if told else "--until-stdin-closes"]
    return command + [f"--{name}={value}" for name, value in asdict(job).items() if name != "mode"]


def _reason(code: int, errors: str, logs: Path) -> str:
    """Returns the last line of what the child wrote to stderr; of several ranks, of the one that failed first."""
    # torchrun lists the ranks that failed; it ends the others by SIGTERM
    killed = [-int(number) for number in re.findall(r"exitcode\s*:\s*(-\d+)", errors) if int(number) != -signal.SIGTERM]
    if code < 0 or killed:
        name = signal.Signals(killed[0] if killed else -code).name
        return f"ended by {name}" + (", is the memory full?" if name == "SIGKILL" else "")
    # a rank's traceback is the last that it writes, and those of its peers, which miss it, come later
    ranks = [path for path in logs.rglob("stderr.log") if "Traceback" in path.read_text(errors="replace")]
    if ranks:
        errors = min(ranks, key=lambda path: path.stat().st_mtime_ns).read_text(errors="replace")
    return last_line(errors) or f"exit code {code}"


def last_line(errors: str) -> str:
    """Returns the last line of stderr that is not empty, without torchrun's "[rank0]:"; "" where there is none."""
    lines = [re.sub(r"^\[rank\d+\]:", "", line).strip() for line in errors.splitlines()]
    return next((line for line in reversed(lines) if line), "")
