import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest

from precision_core.testing import curve_distance, loss_bound
from precision_lab.cli import main
from precision_lab.loop import Job
from precision_lab.process import ChildFailed, _reason, run_child
from precision_lab.train import train

# Float32, and in its sixth step the second rank fails, once the losses of the five before have arrived.
FAILING = """
import os, time
from pathlib import Path
from precision_core import Precision

class Failing(Precision):
    mode = "failing"

    def __init__(self, mode):
        super().__init__(policy="32-true")

    def optimizer_step(self, *args, **kwargs):
        if os.environ["RANK"] == "1" and self.steps == 5:
            end = time.monotonic() + 30
            while not Path("{arrived}").exists() and time.monotonic() < end:
                time.sleep(0.01)
            raise ArithmeticError("in the sixth step" if time.monotonic() < end else "lines are held back")
        return super().optimizer_step(*args, **kwargs)
"""


@pytest.mark.slow_start
def test_two_processes_train_as_one_does_until_a_rank_fails_and_says_why(install, tmp_path):
    """Under torchrun and with a strategy that is named; each line comes when it is written."""
    source = FAILING.format(arrived=tmp_path / "arrived")
    install("failing", "[precision.plugins]\nfailing = failing_module:Failing\n", "failing_module", source)
    two = []
    with pytest.raises(ChildFailed, match=r"^ArithmeticError: in the sixth step$"):
        for event in run_child(Job("failing", 8, 0, "cpu", 2, "ddp")):
            two += [event["loss"]] if "loss" in event else []
            if len(two) == 5:
                (tmp_path / "arrived").touch()
    events = train(Job("32-true", 8, 0, "cpu"))
    one = list(islice((event["loss"] for event in events if "loss" in event), 5))
    assert len(two) == 5
    assert curve_distance(two, one) <= loss_bound("32-true", 5)


@pytest.mark.full
@pytest.mark.slow_start
def test_the_reason_is_the_last_line_of_the_traceback():
    events = run_child(Job("32-true", 1, 0, accelerator="nonsense"))
    with pytest.raises(ChildFailed, match=r"^ValueError: .*nonsense") as failure:
        list(events)
    assert "\n" not in str(failure.value)


def losses(mode, devices, steps, strategy="auto"):
    events = run_child(Job(mode, steps, 0, "cpu", devices, strategy))
    return [event["loss"] for event in events if "loss" in event]


@pytest.mark.full
@pytest.mark.slow_start
def test_two_processes_train_as_one_does_with_the_same_batches():
    for mode in ("32-true", "bf16-mixed"):
        one, two = losses(mode, 1, 8), losses(mode, 2, 8)
        assert len(one) == 8
        assert curve_distance(two, one) <= loss_bound(mode, 8)


@pytest.mark.full
@pytest.mark.slow_start
def test_a_strategy_that_is_named_runs():
    one, ddp = losses("32-true", 1, 4), losses("32-true", 1, 4, "ddp")
    assert len(one) == 4
    assert curve_distance(ddp, one) <= loss_bound("32-true", 4)
    with pytest.raises(ChildFailed, match=r"^ValueError: .*SingleDeviceStrategy runs in one process"):
        losses("32-true", 2, 4, "single_device")


@pytest.mark.full
@pytest.mark.slow_start
def test_the_reason_is_that_of_the_rank_which_failed_first():
    events = run_child(Job("32-true", 1, 0, accelerator="nonsense", devices=2))
    with pytest.raises(ChildFailed, match=r"^ValueError: .*nonsense"):
        list(events)


# What torchrun 2.13 prints when ranks fail, without its traceback.
LISTED = """Failures:
[1]:
  rank      : 1 (local_rank: 1)
  exitcode  : {} (pid: 3850)
Root Cause (first observed failure):
[0]:
  rank      : 0 (local_rank: 0)
  exitcode  : {} (pid: 3849)
  traceback : To enable traceback see: ...
"""


def logged(folder, rank, text, seconds):
    file = folder / "run" / "attempt_0" / str(rank) / "stderr.log"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    os.utime(file, (seconds, seconds))


def test_of_two_ranks_the_one_that_failed_first_says_why(tmp_path):
    traceback = "Traceback (most recent call last):\n  File ...\n"
    logged(tmp_path, 0, f"[rank0]: {traceback}[rank0]: RuntimeError: Connection closed by peer\n", 20)
    logged(tmp_path, 1, f"a warning\n{traceback}ValueError: no such mode\n\n", 10)
    assert _reason(1, LISTED.format(1, 1), tmp_path) == "ValueError: no such mode"


@pytest.mark.parametrize("codes", [(-9, 1), (1, -9), (-9, -15)])
def test_of_two_ranks_the_one_that_was_killed_says_why(codes, tmp_path):
    logged(tmp_path, 0, "Traceback (most recent call last):\nRuntimeError: Connection closed by peer\n", 10)
    assert _reason(1, LISTED.format(*codes), tmp_path) == "ended by SIGKILL, is the memory full?"


def test_a_rank_that_torchrun_ended_in_its_traceback_is_no_reason(tmp_path):
    logged(tmp_path, 0, "Traceback (most recent call last):\nValueError: one process only\n", 10)
    logged(tmp_path, 1, "Traceback (most recent call last):\n", 11)
    assert _reason(1, LISTED.format(-15, 1), tmp_path) == "ValueError: one process only"


COMPARE = ["compare", "--steps", "100000", "--modes", "32-true", "--accelerator", "cpu", "--out"]


@contextmanager
def started(folder):
    """Yields the pid, stdout and stderr of a `precision compare` in a Python of its own, and how to wait for it."""
    run = "signal.signal(signal.SIGINT, signal.default_int_handler); main()"  # who runs the tests may ignore it
    code = f"import signal; from precision_lab.cli import main; {run}"
    command = [sys.executable, "-c", code, *COMPARE, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        try:
            yield parent.pid, parent.stdout, parent.stderr, functools.partial(parent.wait, timeout=60)
        finally:
            parent.kill()


@contextmanager
def forked(folder):
    """The same in a fork of this process, which has imported torch already."""
    pipes = [os.pipe() for _ in range(2)]
    parent = multiprocessing.get_context("fork").Process(target=compare, args=(folder, *(end for _, end in pipes)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forking where there are threads
        parent.start()
    for _, end in pipes:
        os.close(end)

    def wait():
        parent.join()
        return parent.exitcode

    with open(pipes[0][0]) as output, open(pipes[1][0]) as errors:
        try:
            yield parent.pid, output, errors, wait
        finally:
            parent.kill()


def compare(folder, output, errors):
    os.dup2(output, 1)
    os.dup2(errors, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs the tests may ignore it
    main([*COMPARE, str(folder)])


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc to see who is whose child")
@pytest.mark.slow_start
@pytest.mark.parametrize("start", [forked, pytest.param(started, marks=pytest.mark.full)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_child_is_left_behind(number, start, tmp_path):
    with start(tmp_path) as (pid, output, errors, wait):
        assert "starts" in output.readline()
        child = wait_for(lambda: first_child(pid))
        os.kill(pid, number)
        code, said = wait(), errors.read()
        assert wait_for(lambda: has_ended(child))
    if number == signal.SIGINT:
        assert code == 1
        assert said.strip() == "Aborted!"


def first_child(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else None


def has_ended(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"  # ended, and nobody has asked how: where process 1 of a container does not


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.05)
    raise TimeoutError
