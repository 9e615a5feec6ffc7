"""The user's task file: found, imported, and its errors shown as Python would, without the frames of this project."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import precision_core
from precision_lab.task import Task, understood

Make = Callable[[], Task]

_OURS = tuple(str(Path(module).parent) for module in (precision_core.__file__, __file__))


class TaskError(Exception):
    """The user's file raised before any training; the message is the user's traceback."""


def check_spec(spec: str) -> tuple[str, str]:
    """Returns (file or module, function) of "task.py:make", "task.py" or "package.module:make".

    Raises:
        ValueError: the file is not there, or the function is no name.
    """
    where, _, function = spec.rpartition(":") if ":" in spec else (spec, "", "make")
    if not function.isidentifier() or not where:
        raise ValueError(f"{spec!r}: expected a file and a function in it, task.py:make")
    if where.endswith(".py"):
        if not Path(where).is_file():
            raise ValueError(f"there is no file {where!r}; precision new {where} writes one to start from")
    elif not all(part.isidentifier() for part in where.split(".")):
        raise ValueError(f"{spec!r}: expected a file that ends in .py, task.py:make, or a module, package.task:make")
    return where, function


def load_make(spec: str) -> Make:
    """Imports the file and returns its function, which then returns a `Task`.

    Raises:
        ValueError: as `check_spec`.
        TaskError: the file raised, has no such function, or that made no task; from the function, when it is called.
    """
    where, name = check_spec(spec)
    with users_errors():
        module = _import(where)
        function = getattr(module, name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        listed = f"; it has {', '.join(there)}" if there else ""
        raise TaskError(f"{where} has no function {name!r}{listed}")
    return guarded(function)


def guarded(function: Callable[[], Any]) -> Make:
    """Returns `function` as one that returns a `Task` and raises `TaskError`."""

    def make() -> Task:
        with users_errors():
            return understood(function())

    return make


@contextmanager
def users_errors() -> Iterator[None]:
    """Context in which whatever the user's code raises becomes a `TaskError`."""
    try:
        yield
    except Exception as error:
        raise TaskError(users_traceback(error)) from error


def users_traceback(error: BaseException) -> str:
    """Returns the error's traceback as Python prints it, without frames of this project and of the import system."""
    shown = traceback.TracebackException.from_exception(error)
    _leave_out_ours(shown)
    return "".join(shown.format()).rstrip()


def _leave_out_ours(shown: traceback.TracebackException | None) -> None:
    if shown is None:
        return
    theirs = [frame for frame in shown.stack if not _is_ours(frame.filename)]
    shown.stack = traceback.StackSummary.from_list(theirs)
    for other in (shown.__cause__, shown.__context__):
        _leave_out_ours(other)


def _is_ours(file: str) -> bool:
    return file.startswith((*_OURS, "<frozen ", "<string>"))


def _import(where: str) -> Any:
    if not where.endswith(".py"):
        sys.path.insert(0, "")  # as `python -m` does
        return importlib.import_module(where)
    path = Path(where).resolve()
    sys.path.insert(0, str(path.parent))  # as `python task.py` does: files beside it can be imported
    name = path.stem
    if name in sys.modules:  # a task.py must not be hidden by, or hide, a module that is there
        name = f"precision_lab_task_{name}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and workers of a DataLoader look it up there
    spec.loader.exec_module(module)
    return module
