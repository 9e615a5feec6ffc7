"""ci/mutations.py as a command: which mutations are killed, which survive, and that the repository's own are found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FILE, TEST = "packages/precision-a/src/a/__init__.py", "packages/precision-a/tests/test_a.py"
SOURCE = "def add(x, y):\n    return x + y\n\n\ndef half(x):\n    return x / 2\n\n\ndef same(x):\n    return x / 1\n"
TESTS = """import a
import pytest

def test_half():
    assert a.half(3) == 1.5

@pytest.mark.full
def test_add():
    assert a.add(1, 2) == 3
"""
SETTINGS = '[tool.pytest.ini_options]\nmarkers = ["full"]\naddopts = ["--import-mode=importlib"]\n'


def entry(line: str, becomes: str, more: str = "", test: str = TEST) -> str:
    text = f'[[mutation]]\nfile = "{FILE}"\nline = "{line}"\nbecomes = "{becomes}"\nwhat = "wrong"\n'
    return f'{text}{more}\ntests = ["{test}"]\n'


LINE = ("return x + y", "return x - y")
HALF = entry("return x / 2", "return x // 2")


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "ci" / "mutations.py", *arguments]
    variables = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # installed ones import what takes seconds
    return subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True)


def passes(repo: Any, *arguments: str) -> str:
    done = run(repo.root, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture
def repo(empty: Any) -> Any:
    empty.write(FILE, text=SOURCE)
    empty.write(TEST, text=TESTS)
    empty.write("pyproject.toml", text=SETTINGS)
    return empty


def test_the_repositorys_own_are_enough_and_found() -> None:
    done = run(ROOT, "--check")
    assert (done.returncode, done.stderr) == (0, "")
    number = re.fullmatch(r"(\d+) mutations, every line is found\n", done.stdout)
    assert number and int(number[1]) >= 80
    files = re.findall(r'^file = "packages/([^/]*)/', (ROOT / "ci" / "mutations.toml").read_text(), re.MULTILINE)
    assert set(files) == {path.parent.name for path in ROOT.glob("packages/*/pyproject.toml")}


def test_a_tier_kills_what_its_tests_notice(repo: Any) -> None:
    repo.write("ci/mutations.toml", text=entry(*LINE) + HALF)
    printed = passes(repo, "--tier", "full", "--jobs", "1")
    assert printed.count("killed  ") == 2
    assert f"  1 {FILE}: wrong (by {TEST}::test_add)" in printed
    assert "precision-a                   2        2        0\n2 are killed of 2" in printed
    assert (repo.root / FILE).read_text() == SOURCE

    done = run(repo.root, "--jobs", "1")
    assert (done.returncode, done.stderr) == (1, "mutations: the fast tier has to kill 90% of those\n")
    assert "precision-a                   2        1        1\nsurvived   1 " in done.stdout


def test_known_survivors_and_other_rows_do_not_count(repo: Any) -> None:
    survives, other = entry("return x / 1", "return x // 1", "survives = true"), entry(*LINE, 'row = "a/b"')
    repo.write("ci/mutations.toml", text=HALF + survives + other)
    printed = passes(repo, "--tier", "full")
    assert f"survived   2 {FILE}: wrong (known)\n1 are killed of 1" in printed
    assert f"skipped           3 {FILE}: wrong (a/b)" in printed
    printed = passes(repo, "--tier", "full", "--row", "a/b", "--only", "2,3")
    assert "precision-a                   1        1        0" in printed
    printed = passes(repo)  # what survives all tests survives some of them
    assert f"skipped           2 {FILE}: wrong (known to survive)" in printed and "1 are killed of 1" in printed


def test_a_run_that_hangs_is_ended_and_one_that_cannot_start_is_an_error(repo: Any) -> None:
    hangs = entry("return x / 2", "import time; time.sleep(60)")
    repo.write("ci/mutations.toml", text=hangs)
    assert "wrong (by the time limit)" in passes(repo, "--seconds", "1")
    repo.write(TEST, text="import a\n")
    done = run(repo.root, "--tier", "full")
    assert done.stderr == "mutations: the tests of 1 could not run\n"
    assert "pytest's exit status 5" in done.stdout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (entry("return x * y", "pass"), f"0 lines of {FILE} read 'return x * y'"),
        (entry("return x + y", "pass", "nth = 2"), f"1 lines of {FILE} read 'return x + y'"),
        (entry("", "pass"), f"4 lines of {FILE} read ''"),
        (entry("return x + y", "return ("), "'(' was never closed"),
        (entry("return x + y", "pass", test="test_b.py"), "there is no test file 'test_b.py'"),
        (entry("return x + y", "pass", "why = 1"), "unexpected keyword argument 'why'"),
    ],
)
def test_an_entry_that_is_wrong_is_an_error(repo: Any, text: str, said: str) -> None:
    repo.write("ci/mutations.toml", text=HALF + text)
    error = repo.error("mutations.py", "--check")
    assert error.startswith("mutations: mutation 2: ") and said in error
