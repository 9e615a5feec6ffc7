"""ci/ran.toml: what a run writes, what it does not, and that the READMEs say the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomllib

ROOT = Path(__file__).parents[2]
MATRIX = """
[base]
python = "3.11"
hardware = "cpu"
torch = "torch==2.13.0"
[[row]]
package = "precision-one"
id = "cpu"
default = true
[[row]]
package = "precision-one"
id = "cuda"
hardware = "cuda"
torch = "torch"
slice = "core"
default = false
[[row]]
package = "tests-integration"
id = "cpu"
default = true
"""
README = "# one\n\n<!-- written by ci/ran.py -->\n<!-- until here -->\n\nNot run: anything else.\n"
JUNIT = '<testsuites><testsuite errors="0" failures="1" skipped="2" tests="10"></testsuite></testsuites>'


@pytest.fixture
def repo(empty: Any) -> Any:
    empty.write("ci/matrix.toml", text=MATRIX)
    empty.write("packages/precision-one/README.md", text=README)
    empty.write("packages/precision-one/code.py")
    empty.commit()
    return empty


def ran(repo: Any) -> list[dict[str, str]]:
    found: list[dict[str, str]] = tomllib.loads((repo.root / "ci/ran.toml").read_text())["ran"]
    return found


def test_a_row_that_ran_is_written_with_commit_and_numbers(repo: Any, tmp_path: Path) -> None:
    (tmp_path / "junit.xml").write_text(JUNIT)
    arguments = ("--junit", str(tmp_path / "junit.xml"))
    said = repo.script("ran.py", "record", "precision-one/cpu", "failed", *arguments)
    assert "precision-one/cpu: failed: 7 passed, 1 failed, 2 skipped" in said
    (entry,) = ran(repo)
    assert entry["commit"] == repo.git("rev-parse", "--short=8", "HEAD")
    assert entry["result"] == "failed: 7 passed, 1 failed, 2 skipped" and entry["row"] == "precision-one/cpu"
    assert len(entry["date"]) == 10 and entry["machine"]
    readme = (repo.root / "packages/precision-one/README.md").read_text()
    assert f"| cpu | 3.11 | 2.13.0 | {entry['date']}, {entry['commit']}, {entry['machine']}: failed: 7 passed" in readme
    assert "| cuda | 3.11 | newest | no run is recorded |" in readme
    assert readme.startswith("# one\n\n") and readme.endswith("\n\nNot run: anything else.\n")
    printed = repo.script("ran.py").splitlines()
    assert printed[1].startswith("precision-one/cpu") and printed[1].endswith("2 skipped")
    assert printed[3].split()[:2] == ["tests-integration/cpu", "cpu"] and printed[3].endswith("no run is recorded")


def test_of_a_row_that_passed_the_numbers_are_enough(repo: Any, tmp_path: Path) -> None:
    (tmp_path / "junit.xml").write_text(JUNIT.replace('failures="1"', 'failures="0"'))
    repo.script("ran.py", "record", "precision-one/cpu", "passed", "--junit", str(tmp_path / "junit.xml"))
    repo.script("ran.py", "record", "tests-integration/cpu", "passed", "--junit", str(tmp_path / "none.xml"))
    assert [each["result"] for each in ran(repo)] == ["8 passed, 2 skipped", "passed"]


def test_the_latest_run_on_a_machine_replaces_the_one_before(repo: Any) -> None:
    repo.script("ran.py", "record", "precision-one/cpu", "failed")
    repo.script("ran.py", "record", "tests-integration/cpu", "passed")  # what the first has changed is no change
    repo.write("packages/precision-one/code.py", text="new\n")
    repo.commit()
    repo.script("ran.py", "record", "precision-one/cpu", "passed")
    assert [(each["row"], each["result"]) for each in ran(repo)] == [
        ("precision-one/cpu", "passed"),
        ("tests-integration/cpu", "passed"),
    ]
    assert ran(repo)[0]["commit"] == repo.git("rev-parse", "--short=8", "HEAD") != ran(repo)[1]["commit"]


def test_changes_in_no_commit_are_not_recorded(repo: Any) -> None:
    repo.write("packages/precision-one/code.py", text="new\n")
    said = repo.script("ran.py", "record", "precision-one/cpu", "passed")
    assert "not recorded" in said and "code.py" in said
    assert not (repo.root / "ci/ran.toml").exists()


def test_an_unknown_row_is_an_error(repo: Any) -> None:
    assert "no row is named precision-one/gpu" in repo.error("ran.py", "record", "precision-one/gpu", "passed")


def test_slices_of_another_machine_are_taken_for_the_rows_that_name_them(repo: Any, tmp_path: Path) -> None:
    entries = [
        {"kind": "begin", "slice": "core", "commit": "12345678", "machine": "a GPU, a CPU", "day": "2026-11-30"},
        {"kind": "begin", "slice": "core", "step": "first"},
        {"kind": "test", "slice": "core", "step": "first", "test": "a", "result": "passed"},
        {"kind": "slice", "slice": "core", "result": "out of time", "tests": {"passed": 41, "failed": 1}},
        {
            "kind": "begin",
            "slice": "core",
            "commit": "12345678+changes",
            "machine": "a GPU, a CPU",
            "day": "2026-12-01",
        },
        {"kind": "slice", "slice": "core", "result": "passed", "tests": {"passed": 42}},
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert repo.script("ran.py", "take", str(tmp_path / "results.jsonl")) == (
        "precision-one/cuda: out of time: 1 failed, 41 passed\n"
        "not recorded: core, of 12345678+changes, which is no commit\n"
    )
    values = ("precision-one/cuda", "12345678", "2026-11-30", "a GPU, a CPU", "out of time: 1 failed, 41 passed")
    assert ran(repo) == [dict(zip(("row", "commit", "date", "machine", "result"), values, strict=True))]


def test_a_readme_that_says_something_else_is_found(repo: Any) -> None:
    repo.script("ran.py", "readmes")
    repo.script("ran.py", "readmes", "--check")
    path = repo.root / "packages/precision-one/README.md"
    path.write_text(path.read_text().replace("no run is recorded", "2026-01-01: passed", 1))
    assert "packages/precision-one/README.md say something else" in repo.error("ran.py", "readmes", "--check")


def test_the_readmes_of_this_repository_say_what_ran() -> None:
    command = [sys.executable, ROOT / "ci" / "ran.py", "readmes", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
