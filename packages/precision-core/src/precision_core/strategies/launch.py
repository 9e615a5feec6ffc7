"""Launching: the processes of a run, started by torch's own launcher (torchrun).

A script is started anew, once in each process: `python train.py` becomes `python -m torch.distributed.run ... train.py`
in the same process, so that signals and the exit code are torchrun's. A function runs in new processes of its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NoReturn

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def restart_script(count: int, variables: Mapping[str, str]) -> NoReturn:
    """Starts the running script again with these variables, in `count` processes here, in place of this process.

    Raises:
        RuntimeError: there is no script that could be started again.
    """
    command, by_hand = [sys.executable], " ".join(f"{name}={value}" for name, value in variables.items())
    if count > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        by_hand = f"{by_hand} torchrun --nproc-per-node={count}".strip()
    command += [*_script(sys.modules["__main__"], count, by_hand), *sys.argv[1:]]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, command, {**os.environ, **variables})


def _script(main: ModuleType, count: int, by_hand: str) -> list[str]:
    """Returns Python's, or torchrun's, arguments for what Python was started with: a file, or `-m` and a module."""
    if getattr(main, "__spec__", None) is not None:
        return ["-m", main.__spec__.name.removesuffix(".__main__")]  # type: ignore[union-attr]
    path = _file(main)
    if path is None:
        times = "again" if count == 1 else f"{count} times"
        raise RuntimeError(
            f"fabric.launch() has no script to start {times}: this one came from standard input, -c, or an "
            f"interactive session. Put it into a file, pass a function (fabric.launch(train)), or start with {by_hand}"
            " [no-script]"
        )
    return [os.path.abspath(path)]


def _file(main: ModuleType) -> str | None:
    """Returns the file of the running script; what came from standard input calls itself <stdin>, and has none."""
    path = getattr(main, "__file__", None)
    return path if path is not None and os.path.isfile(path) else None


def run_function(function: Callable[..., Any], args: tuple[Any, ...], count: int, variables: Mapping[str, str]) -> Any:
    """Returns what `function(*args)` returns on rank zero of `count` new processes of this machine.

    They have the environment of this process, and `variables`.

    In a script the processes are spawned, and `function` and `args` must pickle. Without one (a notebook, -c, standard
    input) they are forked.

    Raises:
        RuntimeError: a process failed; holds the traceback of the one that failed first.
    """
    main = sys.modules["__main__"]
    interactive = getattr(main, "__spec__", None) is None and _file(main) is None
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
        with _environment(variables):
            return elastic_launch(config, function)(*args)[0]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise RuntimeError(f"rank {rank} of {count} failed first:\n{failure.message}") from error


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Context in which new processes are started with these variables, too."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
