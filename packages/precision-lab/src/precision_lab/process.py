"""One child process, and the lines it sends.

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
from collections.abc import Generator
from pathlib import Path
from typing import Any

from precision_lab.train import Job

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


def run_child(job: Job) -> Generator[dict[str, Any], None, None]:
    """Runs `python -m precision_lab.train`, by torchrun for several processes, and yields its lines as they come.

    The child never outlives the generator (close it: `contextlib.closing`), nor this process: when that is killed, its
    end of the child's stdin closes.

    Raises:
        ChildFailed: with the last line of the child's traceback, or the signal that ended it.
    """
    environment = _VENDORS | os.environ
    with (
        tempfile.TemporaryDirectory() as logs,
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(
            _command(job, logs),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        ) as child,
    ):
        assert child.stdout is not None
        try:
            for line in child.stdout:
                yield json.loads(line)
            code = child.wait()
        finally:
            child.kill()  # does nothing when it has ended
        if code:
            errors.seek(0)
            raise ChildFailed(_reason(code, errors.read(), Path(logs)))


def _command(job: Job, logs: str) -> list[str]:
    command = [sys.executable, "-m"]
    if job.devices > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={job.devices}"]
        # each rank's stderr in a file of its own: in one stream their tracebacks mix
        command += ["--log-dir", logs, "--redirects", "2", "-m"]
    command += ["precision_lab.train", job.mode, "--until-stdin-closes", "--devices", str(job.devices)]
    command += ["--steps", str(job.steps), "--seed", str(job.seed), "--accelerator", job.accelerator]
    return [*command, "--strategy", job.strategy]


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
