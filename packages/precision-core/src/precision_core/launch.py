"""Launching: the processes of a run, started by torch's own launcher (torchrun).

A script is started anew, once in each process: `python train.py` becomes `python -m torch.distributed.run ... train.py`
in the same process, so that signals and the exit code are torchrun's. A function runs in new processes of its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def restart_script(count: int) -> NoReturn:
    """Starts the running script again, in `count` processes on this machine, in place of this process.

    Raises:
        RuntimeError: there is no script that could be started again.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command += [*_script(sys.modules["__main__"], count), *sys.argv[1:]]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, command)


def _script(main: ModuleType, count: int) -> list[str]:
    """Returns torchrun's arguments for what Python was started with: a file, or `-m` and a module."""
    if getattr(main, "__spec__", None) is not None:
        return ["-m", main.__spec__.name.removesuffix(".__main__")]  # type: ignore[union-attr]
    path = getattr(main, "__file__", None)
    if path is None or not os.path.isfile(path):
        raise RuntimeError(
            f"fabric.launch() has no script to start {count} times: this one came from standard input, -c, or an "
            f"interactive session. Put it into a file, pass a function (fabric.launch(train)), or start with torchrun "
            f"--nproc-per-node={count}"
        )
    return [os.path.abspath(path)]


def run_function(function: Callable[..., Any], args: tuple[Any, ...], count: int) -> Any:
    """Returns what `function(*args)` returns on rank zero of `count` new processes of this machine.

    In a script the processes are spawned, and `function` and `args` must pickle; in a notebook they are forked.

    Raises:
        RuntimeError: a process failed; holds the traceback of the one that failed first.
    """
    interactive = not hasattr(sys.modules["__main__"], "__file__")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="fork" if interactive else "spawn",
    )
    try:
        return elastic_launch(config, function)(*args)[0]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise RuntimeError(f"rank {rank} of {count} failed first:\n{failure.message}") from error
