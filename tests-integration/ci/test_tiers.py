"""The fast tier: a test that takes too long fails the session by name, and one that did so by chance does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ALWAYS = """
import time

def test_burns():
    start = time.process_time()
    while time.process_time() < start + 0.5:
        pass
"""
BY_CHANCE = """
import pathlib
import time

def test_burns():
    first = pathlib.Path(__file__).with_name("first")
    start = time.process_time()
    while not first.exists() and time.process_time() < start + 0.5:
        pass
    first.touch()
"""


def fast_tier(folder: Path, code: str, measured: float = 1.0) -> subprocess.CompletedProcess[str]:
    """Runs one test file in a fast tier that lets a test take a quarter of a second."""
    conftest = (ROOT / "conftest.py").read_text()
    changed = conftest.replace("LIMIT, LIMIT_OF_STARTS = 5.0, 20.0", "LIMIT, LIMIT_OF_STARTS = 0.25, 20.0")
    changed = changed.replace("max(_yardstick() / YARDSTICK, _start() / START)", str(measured))
    assert changed.count("0.25, 20.0") == 1 and "_yardstick() /" not in changed
    (folder / "conftest.py").write_text(changed)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    full: left out\n")
    (folder / "test_it.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-m", "not full", "-p", "no:cacheprovider", "test_it.py"]
    env = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # they import torch
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)


def test_a_test_that_is_too_slow_fails_the_session_by_name(tmp_path: Path) -> None:
    run = fast_tier(tmp_path, ALWAYS)
    assert run.returncode == pytest.ExitCode.TESTS_FAILED
    *_, line, result = filter(None, run.stdout.splitlines())
    assert line.startswith("test_it.py::test_burns: 0.") and "of 0 CPU seconds" in line
    assert "1 passed" in result


def test_on_a_slow_machine_it_may_take_twice_what_the_measures_say(tmp_path: Path) -> None:
    assert fast_tier(tmp_path, ALWAYS, 1.5).returncode == pytest.ExitCode.OK
    assert fast_tier(tmp_path, ALWAYS, 1.1).returncode == pytest.ExitCode.TESTS_FAILED


def test_one_that_is_fast_when_tried_again_does_not(tmp_path: Path) -> None:
    run = fast_tier(tmp_path, BY_CHANCE)
    assert run.returncode == pytest.ExitCode.OK, run.stdout
    assert "test_it.py::test_burns" in run.stdout  # among the slowest still
    assert "too slow" not in run.stdout
