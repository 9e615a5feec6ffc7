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
from typing import Any

from precision_lab.train import Job

_VENDORS = {
    # cuBLAS is deterministic only with a fixed workspace.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # OpenMP's threads spin while they wait for each other. With two threads on two cores a bf16-true step took 35 ms on
    # an idle machine and 1.5 s on a busy one; one thread takes 58 ms on both, and the same losses on any machine size.
    "OMP_NUM_THREADS": "1",
}
"""What libraries read from the environment when they start. The user's own settings come first."""


class ChildFailed(Exception):
    """The child ended before its work was done; the message says why."""


def run_child(job: Job) -> Generator[dict[str, Any], None, None]:
    """Runs `python -m precision_lab.train`, by torchrun for several processes, and yields its lines as they come.

    The child never outlives the generator (close it: `contextlib.closing`), nor this process: when that is killed, its
    end of the child's stdin closes.

    Raises:
        ChildFailed: with the last line of the child's traceback, or the signal that ended it.
    """
    command = [sys.executable, "-m"]
    if job.devices > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={job.devices}", "-m"]
    command += ["precision_lab.train", job.mode, "--until-stdin-closes", "--devices", str(job.devices)]
    command += ["--steps", str(job.steps), "--seed", str(job.seed), "--accelerator", job.accelerator]
    command += ["--strategy", job.strategy]
    environment = _VENDORS | os.environ
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
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
            raise ChildFailed(_reason(code, errors.read()))


def _reason(code: int, errors: str) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        return f"ended by {name}" + (", is the memory full?" if name == "SIGKILL" else "")
    lines = [line for line in errors.splitlines() if line.strip()]
    ranks = [line.partition(":")[0] for line in lines if re.match(r"\[rank\d+\]:", line)]
    if ranks:  # the one that failed first, of which torchrun's own lines at the end say less
        lines = [line.removeprefix(f"{ranks[0]}:") for line in lines if line.startswith(f"{ranks[0]}:")]
    elif "ChildFailedError" in errors:  # before the ranks had met: they do not say who they are
        start = next(index for index, line in enumerate(lines) if line.startswith("Traceback"))
        lines = [line for line in lines[start + 1 :] if not line.startswith(" ")][:1]
    return lines[-1].strip() if lines else f"exit code {code}"
