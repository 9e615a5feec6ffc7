"""Runs a script under observation, as `python script.py` would, and ends it after some training steps."""

from __future__ import annotations

import os
import runpy
import sys
from dataclasses import dataclass

from precision_lab.auditing.recorder import Recorder
from precision_lab.auditing.report import Report
from precision_lab.taskfile import users_traceback


class _Enough(BaseException):
    """Ends the script where it has trained enough: no `except Exception` of its own catches it."""


_TIMES = 100


@dataclass
class Outcome:
    """How the script ended."""

    report: Report
    traceback: str = ""  # of the script, if it failed
    interrupted: bool = False  # by Ctrl-C
    exit_code: int = 0  # its own


def audit_script(path: str, arguments: list[str], steps: int | None = 2) -> Outcome:
    """Runs the script until `steps` training steps have ended, or to its end (None)."""
    taken = list[int]()

    def on_step(ended: int) -> None:
        # Again and again: a script may catch everything.
        if steps is not None and ended >= steps and len(taken) < _TIMES:
            taken.append(ended)
            raise _Enough

    recorder = Recorder(on_step)
    outcome = Outcome(Report())
    old_argv, old_path = sys.argv, list(sys.path)
    sys.argv = [path, *arguments]
    sys.path[0] = os.path.dirname(os.path.abspath(path))
    try:
        with recorder:
            runpy.run_path(os.path.abspath(path), run_name="__main__")
    except _Enough:
        pass
    except KeyboardInterrupt:
        outcome.interrupted, outcome.exit_code = True, 130
        recorder.note_unseen(f"interrupted after {recorder.record.steps} training steps")
    except SystemExit as ended:
        if not taken and ended.code not in (None, 0):
            outcome.exit_code = ended.code if isinstance(ended.code, int) else 1
            outcome.traceback = f"the script ended with {ended.code!r}"
    except Exception as error:
        if not taken:  # what a script's own clean-up raises when it is ended is no failure of it
            outcome.traceback, outcome.exit_code = users_traceback(error), 1
    finally:
        sys.argv, sys.path[:] = old_argv, old_path
    outcome.report.fill(recorder.record)
    if len(taken) == _TIMES:
        recorder.note_unseen("the script caught what ends it, and ran on to its own end")
    if steps is not None and recorder.record.steps < steps and not outcome.traceback and not outcome.interrupted:
        recorder.note_unseen(f"the script ended after {recorder.record.steps} training steps")
    if steps is not None:
        recorder.note_unseen("what the script does later: checkpoints, evaluation (--steps all runs it to its end)")
    return outcome
