import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from precision_core.testing import curve_distance, loss_bound
from precision_lab.process import ChildFailed, run_child
from precision_lab.train import Job


def test_the_reason_is_the_last_line_of_the_traceback():
    events = run_child(Job("32-true", 1, 0, accelerator="nonsense"))
    with pytest.raises(ChildFailed, match=r"^ValueError: .*nonsense") as failure:
        list(events)
    assert "\n" not in str(failure.value)


def losses(mode, devices, steps, strategy="auto"):
    events = run_child(Job(mode, steps, 0, "cpu", devices, strategy))
    return [event["loss"] for event in events if "loss" in event]


def test_two_processes_train_as_one_does_with_the_same_batches():
    for mode in ("32-true", "bf16-mixed"):
        one, two = losses(mode, 1, 8), losses(mode, 2, 8)
        assert len(one) == 8
        assert curve_distance(two, one) <= loss_bound(mode, 8)


def test_a_strategy_that_is_named_runs():
    one, ddp = losses("32-true", 1, 4), losses("32-true", 1, 4, "ddp")
    assert len(one) == 4
    assert curve_distance(ddp, one) <= loss_bound("32-true", 4)
    with pytest.raises(ChildFailed, match=r"^ValueError: .*SingleDeviceStrategy runs in one process"):
        losses("32-true", 2, 4, "single_device")


def test_the_reason_is_that_of_the_rank_which_failed_first():
    events = run_child(Job("32-true", 1, 0, accelerator="nonsense", devices=2))
    with pytest.raises(ChildFailed, match=r"^ValueError: .*nonsense"):
        list(events)


COMPARE = [sys.executable, "-m", "precision_lab.cli", "compare", "--steps", "100000", "--modes", "32-true"]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc to see who is whose child")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_child_is_left_behind(number, tmp_path):
    command = [*COMPARE, "--accelerator", "cpu", "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        try:
            line = parent.stdout.readline()
            assert "starts" in line
            child = wait_for(lambda: first_child(parent.pid))
            parent.send_signal(number)
            _, errors = parent.communicate(timeout=60)
            assert wait_for(lambda: has_ended(child))
        finally:
            parent.kill()
    if number == signal.SIGINT:
        assert parent.returncode == 1
        assert errors.strip() == "Aborted!"
    assert not list(tmp_path.iterdir())


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
