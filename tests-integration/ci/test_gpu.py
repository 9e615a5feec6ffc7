"""Slices for a GPU image: their order, what a dry run says, and what is written when one fails or runs out of time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tomllib

ROOT = Path(__file__).parents[2]
SLICES = tomllib.loads((ROOT / "ci" / "gpu_slices.toml").read_text())
MATRIX = tomllib.loads((ROOT / "ci" / "matrix.toml").read_text())
# as a shell has it: a worker of pytest-xdist would tell its children that they are workers, too
ENVIRONMENT = {name: text for name, text in os.environ.items() if name != "OUT" and not name.startswith("PYTEST_")}

HEAD = 'wheels = "wheels"\npython = "3.12"\nmost-mib = 1\n\n[brings]\n'


def gpu(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "ci" / "gpu.py", *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def slices_of(folder: Path, *tables: str) -> Path:
    """Writes a file of slices; each step of a table is Python code, or a test file's name."""
    file = folder / "ci" / "slices.toml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(HEAD + "".join(f"[[slice]]\n{table}\n" for table in tables))
    return file


def code(name: str, text: str) -> str:
    return f"{{ name = {json.dumps(name)}, command = ['{{python}}', '-S', '-c', {json.dumps(text)}] }}"


def lines(out: Path, kind: str = "") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return [each for each in found if kind in ("", each["kind"])]


# -------------------------------------------------------------------- the file


def test_what_hurts_most_users_comes_first() -> None:
    listed = [line.split()[0] for line in gpu("--list").stdout.splitlines()]
    assert listed == ["core", "lab", "fsdp", "deepspeed", "formats", "bnb", "beside", "te"]


def test_each_slice_fits_and_names_what_is_there() -> None:
    packages = {path.name for path in ROOT.glob("packages/*")}
    for each in SLICES["slice"]:
        assert 0 < each["minutes"] <= 9, each["name"]
        assert packages.issuperset(each["installs"]) and SLICES["brings"].keys() >= set(each["brings"])
        for step in each["steps"]:
            words = [*step.get("tests", []), *step.get("command", [])]
            paths = [word for word in words if word.startswith(("packages/", "benchmarks/"))]
            assert all((ROOT / path).exists() for path in paths), paths
            assert bool(step.get("tests")) != bool(step.get("command"))


def test_every_slice_is_a_row_and_every_test_on_a_gpu_in_a_slice() -> None:
    rows = [row["slice"] for row in MATRIX["row"] if "slice" in row]
    assert sorted(rows) == sorted(each["name"] for each in SLICES["slice"])
    words = {word for each in SLICES["slice"] for step in each["steps"] for word in step.get("tests", [])}
    for file in ROOT.glob("packages/*/tests/cuda/test_*.py"):
        assert {file.relative_to(ROOT).as_posix(), file.parent.relative_to(ROOT).as_posix()} & words, file


def test_a_dry_run_says_what_would_run_in_the_order_of_the_file(tmp_path: Path) -> None:
    said = gpu("--dry-run", "formats", "core", "--out", tmp_path / "out").stdout.splitlines()
    assert said[0].startswith("# 2 slices, at most 17 minutes, of commit ")
    assert [line for line in said if line.endswith(" minutes")] == ["# core: 9 minutes", "# formats: 8 minutes"]
    install = said[said.index("# core: 9 minutes") + 1]
    assert "pip install --quiet --force-reinstall --no-deps --no-index" in install and "precision-core" in install
    tests = [line.partition("pytest ")[2] for line in said if " -m pytest " in line]
    assert [next(word for word in line.split() if word.endswith(".py")).rpartition("/")[2] for line in tests] == [
        "test_collectives.py",
        "test_syncs.py",
        "test_contract.py",
        "test_contract.py",
    ]
    assert said[-5].partition("    # ")[0] == "$python benchmarks/bench_gpu_formats.py --modes bf16-mixed"
    assert not (tmp_path / "out").exists()


def test_a_dry_run_without_names_has_all_slices() -> None:
    said = gpu("--dry-run").stdout.splitlines()
    assert [line.split()[1].rstrip(":") for line in said if line.endswith(" minutes")] == [
        each["name"] for each in SLICES["slice"]
    ]
    assert "# left out here, where there is no transformer_engine, transformer_engine_torch" in said
    assert said[-1].startswith("# $python -m pytest") and said[-1].endswith(
        "packages/precision-te/tests/cuda    # kernels"
    )


def test_a_dry_run_is_a_script_that_runs_the_steps(tmp_path: Path) -> None:
    told = "import os, sys; print(sys.executable, os.environ['PYTEST_DISABLE_PLUGIN_AUTOLOAD'], os.environ['A'])"
    step = code("says what it has", told).replace(" }", ", environment = { A = 'a b' } }")
    slices = slices_of(tmp_path, f"name = 'one'\nminutes = 1\nsteps = [{step}]")
    script = gpu("--dry-run", "--slices", slices, "--out", tmp_path / "out").stdout
    ran = subprocess.run(["sh", "-e", "-c", script], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert (ran.stdout, ran.stderr) == (f"{sys.executable} 1 a b\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cores"], "no slice is named cores; there are: core, lab"),
        ([], "name a slice; there are: core, lab"),
        (["core"], "name a folder for the results: --out FOLDER, or the variable OUT"),
    ],
)
def test_what_cannot_be_run_is_said(arguments: list[str], message: str) -> None:
    done = gpu(*arguments)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


# -------------------------------------------------------------------- results

TESTS = """
import os, pathlib, time

def test_fast():
    pass

def test_wrong():
    assert 1 == 2

def test_slow():
    pathlib.Path(os.environ["PID"]).write_text(str(os.getpid()))
    time.sleep(600)
"""


def a_slow_slice(folder: Path, minutes: float) -> Path:
    (folder / "test_it.py").write_text(TESTS)
    environment = f"{{ PID = {json.dumps(str(folder / 'pid'))} }}"
    tests = json.dumps([str(folder / "test_it.py"), "--rootdir", str(folder), "-c", os.devnull])
    steps = [
        code("first", "print('figures so far')"),
        f"{{ name = 'tests', tests = {tests}, environment = {environment} }}",
        code("last", "print('never')"),
    ]
    return slices_of(folder, f"name = 'slow'\nminutes = {minutes}\nsteps = [{', '.join(steps)}]")


def check_what_was_written(folder: Path, result: str) -> None:
    """Asserts that all that was over is written, that the rest is named, and that nothing runs on."""
    out = folder / "out"
    assert [(each["test"].rpartition("::")[2], each["result"]) for each in lines(out, "test")] == [
        ("test_fast", "passed"),
        ("test_wrong", "failed"),
    ]
    assert "assert 1 == 2" in lines(out, "test")[1]["why"]
    assert [(each["step"], each["result"]) for each in lines(out, "step")] == [
        ("first", "passed"),
        ("tests", result),
        ("last", "not begun"),
    ]
    (whole,) = lines(out, "slice")
    assert whole["result"] == result and whole["tests"] == {"passed": 1, "failed": 1}
    assert lines(out)[0]["commit"] and lines(out)[0]["machine"]
    assert "figures so far" in (out / "slow.log").read_text() and "figures so far" in lines(out, "step")[0]["log"]
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / "pid").read_text()), 0)


def test_a_slice_that_runs_out_of_time_has_written_what_it_had(tmp_path: Path) -> None:
    for minutes in (0.15, 0.5, 2.0):  # on a busy machine pytest is not at the slow test after nine seconds
        done = gpu("slow", "--slices", a_slow_slice(tmp_path, minutes), "--out", tmp_path / "out")
        if (tmp_path / "pid").exists():
            break
        shutil.rmtree(tmp_path / "out")
    assert done.returncode == 1 and done.stderr == ""
    check_what_was_written(tmp_path, "out of time")


def test_a_slice_that_is_ended_from_outside_has_too(tmp_path: Path) -> None:
    file = a_slow_slice(tmp_path, 1)
    file.write_text(file.read_text() + f"[[slice]]\nname = 'next'\nminutes = 1\nsteps = [{code('it', 'pass')}]\n")
    command = [sys.executable, ROOT / "ci" / "gpu.py", "slow", "next", "--slices", file, "--out"]
    process = subprocess.Popen([*command, tmp_path / "out"], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    limit = time.monotonic() + 30
    while not (tmp_path / "pid").exists() and time.monotonic() < limit:
        time.sleep(0.05)
    time.sleep(0.2)  # the file may be empty still
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 1
    check_what_was_written(tmp_path, "ended from outside")


def test_what_fails_does_not_keep_the_next_from_running(tmp_path: Path) -> None:
    steps = [code("wrong", "raise SystemExit(3)"), code("right", "pass")]
    without = f"name = 'without'\nminutes = 1\nrequires = ['no_such_module']\nsteps = [{code('it', 'pass')}]"
    file = slices_of(tmp_path, f"name = 'one'\nminutes = 1\nsteps = [{', '.join(steps)}]", without)
    assert gpu("without", "one", "--slices", file, "--out", tmp_path / "out").returncode == 1
    assert [(each["step"], each["result"]) for each in lines(tmp_path / "out", "step")] == [
        ("wrong", "failed: exit status 3"),
        ("right", "passed"),
        ("it", "not begun"),
    ]
    assert [each["result"] for each in lines(tmp_path / "out", "slice")] == [
        "failed: exit status 3",
        "left out: the image has no no_such_module",
    ]


def test_results_of_a_second_run_are_appended_and_counted_alone(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it():\n    pass\n")
    tests = json.dumps([str(tmp_path / "test_it.py"), "--rootdir", str(tmp_path), "-c", os.devnull])
    file = slices_of(tmp_path, f"name = 'one'\nminutes = 1\nsteps = [{{ name = 'tests', tests = {tests} }}]")
    for _ in range(2):
        assert gpu("one", "--slices", file, "--out", tmp_path / "out").returncode == 0
    assert [each["tests"] for each in lines(tmp_path / "out", "slice")] == [{"passed": 1}] * 2


def test_without_its_wheels_a_slice_runs_nothing(tmp_path: Path) -> None:
    file = slices_of(tmp_path, f"name = 'one'\nminutes = 1\ninstalls = ['precision-core']\nsteps = [{code('it', '')}]")
    done = gpu("one", "--slices", file, "--out", tmp_path / "out")
    assert done.returncode == 1 and "-m pip install --quiet" in done.stdout  # and what pip said
    assert [(each["step"], each["result"]) for each in lines(tmp_path / "out", "step")] == [
        ("install", "failed: exit status 1"),
        ("it", "not begun"),
    ]
