"""`nox`: lint and the fast tier. `nox -s full`: every row that this machine can run. Rows: ci/matrix.toml."""

from __future__ import annotations

import atexit
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2026.8.10"  # older reports do not say why a session was skipped
nox.options.default_venv_backend = "uv"

ROOT = Path(__file__).parent
MATRIX = nox.project.load_toml(ROOT / "ci" / "matrix.toml")
BASE = MATRIX["base"]
ROWS: dict[str, dict[str, Any]] = {f"{row['package']}/{row['id']}": BASE | row for row in MATRIX["row"]}
SAME = ("python", "torch", "hardware")
BUDGETS: dict[str, int] = MATRIX["minutes"] | {f"tests({name})": row["minutes"] for name, row in ROWS.items()}

# uv does not read pip's settings: where pip is offered a CPU build of torch, uv shall take it too.
os.environ.setdefault("UV_FIND_LINKS", os.environ.get("PIP_FIND_LINKS", ""))
# uv writes no bytecode of its own accord; where PYTHONDONTWRITEBYTECODE is set each process would compile torch anew.
os.environ.setdefault("UV_COMPILE_BYTECODE", "1")


def _cuda() -> str | None:
    if not shutil.which("nvidia-smi"):
        return "no NVIDIA GPU found (nvidia-smi is missing)"
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return None if "GPU " in listing.stdout else "no NVIDIA GPU found (nvidia-smi -L lists none)"


def _tpu() -> str | None:
    found = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return None if found else "no TPU found (neither /dev/accel* nor /dev/vfio/*)"


# A probe returns None where the hardware is present, else the reason why not.
HARDWARE: dict[str, Callable[[], str | None]] = {"cpu": lambda: None, "cuda": _cuda, "tpu": _tpu}
MISSING = {name: reason for name, probe in HARDWARE.items() if (reason := probe())}


def _third_party() -> list[str]:
    """What the packages require, less torch (BASE pins it), the vendors (Any to mypy) and each other."""
    root = nox.project.load_toml(ROOT / "pyproject.toml")
    vendors = root["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    members = [nox.project.load_toml(path)["project"] for path in sorted(ROOT.glob("packages/*/pyproject.toml"))]
    left_out = {"torch", *vendors, *(member["name"].replace("-", "_") for member in members)}
    lists = [[member.get("dependencies", []), *member.get("optional-dependencies", {}).values()] for member in members]
    required = [requirement for each in lists for requirements in each for requirement in requirements]
    return [each for each in required if re.split(r"[^\w.-]", each)[0].replace("-", "_") not in left_out]


@nox.session(python=BASE["python"])
def lint(session: nox.Session) -> None:
    """ruff and mypy over all packages."""
    # it imports nothing of them: bytecode would take longer than the checks
    session.install("--group", "dev", BASE["torch"], "numpy", *_third_party(), env={"UV_COMPILE_BYTECODE": "0"})
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")


def _param(name: str, row: dict[str, Any]) -> Any:
    """The row as a session. It gets no environment where its hardware is missing, and it is only there to say so, and
    where a ready-made image has one."""
    python = False if row["hardware"] in MISSING or row["slice"] else row["python"]
    return nox.param(python, row, id=name, tags=[row["package"], row["hardware"], *row["tags"]])


# What shares one environment, and so one session; the other default rows are there to say what hardware they miss.
SHARED = {name: row for name, row in ROWS.items() if row["default"] and all(row[key] == BASE[key] for key in SAME)}
nox.options.sessions = [
    "lint",
    "fast",
    *(f"tests({name})" for name, row in ROWS.items() if row["default"] and name not in SHARED),
]


def _folder(row: dict[str, Any]) -> str:
    name: str = row["package"]
    return name if name == "tests-integration" or name.startswith("examples/") else f"packages/{name}"


def _editable(folder: str) -> list[str]:
    """What installs a folder's package, with its test group if it has one."""
    groups = nox.project.load_toml(ROOT / folder / "pyproject.toml").get("dependency-groups", {})
    return ["-e", folder, *(["--group", f"{folder}/pyproject.toml:test"] if "test" in groups else [])]


def _built(session: nox.Session, row: dict[str, Any]) -> str:
    """Returns the wheel that a row builds against its torch, and fits no other: from the user's cache, or new."""
    code = "import torch; print(torch.__version__)"
    version = str(session.run("python", "-c", code, silent=True)).strip().splitlines()[-1]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "precision-wheels", f"torch-{version}")
    name, _, wanted = row["builds"].partition("==")
    pattern = f"{name.replace('-', '_')}-{wanted}-cp{row['python'].replace('.', '')}-*.whl"
    if not list(cache.glob(pattern)):
        session.log(f"building {row['builds']} against torch {version}; the wheel stays in {cache}")
        with tempfile.TemporaryDirectory() as folder:  # what is broken off leaves nothing in the cache
            options = ("--no-deps", "--no-build-isolation", "--no-cache-dir", "-w", folder)
            session.run("python", "-m", "pip", "wheel", *options, row["builds"], env=row["build-env"])
            cache.mkdir(parents=True, exist_ok=True)
            for wheel in Path(folder).glob(pattern):
                shutil.move(wheel, cache / wheel.name)
    return str(next(cache.glob(pattern)))


@nox.session
@nox.parametrize("python,row", [_param(name, row) for name, row in ROWS.items()])
def tests(session: nox.Session, row: dict[str, Any]) -> None:
    """One row of the matrix: its pins, the bounds between the packages, the package's tests."""
    folder, name = _folder(row), f"{row['package']}/{row['id']}"
    if row["slice"]:
        if reason := MISSING.get(row["hardware"]):
            session.skip(f"needs {row['hardware']}: {reason}")
        with _recorded(session, name):
            session.run(sys.executable, "ci/gpu.py", row["slice"], "--out", session.create_tmp(), external=True)
        return
    pytest = ["pytest", *_paths(row)]
    workers = ["pytest-xdist"] if row["workers"] > 1 else []
    if workers:
        pytest += ["-n", str(row["workers"])]
    session.log(f"this row without nox: {shlex.join(pytest)}")
    if reason := MISSING.get(row["hardware"]):
        session.skip(f"needs {row['hardware']}: {reason}")
    # one command: outside of the workspace only that lets a package find core in the checkout
    installs = [option for each in row.get("installs", [folder]) for option in _editable(each)]
    session.install(*installs, row["torch"], *row["pins"], *row["alone"], *workers)
    if row["builds"]:
        session.install(_built(session, row))
    if session.venv_backend != "none":  # a ready-made image has no uv, and packages whose bounds are not ours to check
        session.run("uv", "pip", "check", external=True)  # uv ignores version bounds between workspace packages
    if session.posargs:  # a part of the row, which says nothing of all of it
        session.run(*pytest, *session.posargs)
        return
    with _recorded(session, name) as junit:
        session.run(*pytest, "--junitxml", junit)


@contextmanager
def _recorded(session: nox.Session, name: str) -> Iterator[str]:
    """Context in which a row runs, after which ci/ran.toml says that it did; pytest's report is to go to the path."""
    junit = Path(session.create_tmp(), "junit.xml")
    junit.unlink(missing_ok=True)

    def record(result: str) -> None:
        command = (sys.executable, "ci/ran.py", "record", name, result, "--junit", str(junit))
        session.run(*command, external=True, success_codes=[0, 1])

    try:
        yield str(junit)
    except CommandFailed:
        record("failed")
        raise
    record("passed")


# -------------------------------------------------------------------- tiers


def _paths(row: dict[str, Any]) -> list[str]:
    folder = _folder(row)
    return row["only"] or [folder if folder == "tests-integration" else f"{folder}/tests"]


BIN = ""  # of the environment with everything, which `env` makes before any session that requires it


@nox.session(python=BASE["python"], reuse_venv=True, default=False)
def env(session: nox.Session) -> None:
    """One environment with every package that can share one, and the developers' tools: `.nox/env/bin/pytest PATH`."""
    global BIN
    folders = {folder: None for row in SHARED.values() for folder in row.get("installs", [_folder(row)])}
    pins = {pin: None for row in SHARED.values() for pin in row["pins"]}
    installs = [option for folder in folders for option in _editable(folder)]
    session.install(*installs, BASE["torch"], *pins, "pytest-xdist", "--group", "dev")
    if session.venv_backend != "none":
        session.run("uv", "pip", "check", external=True)  # uv ignores version bounds between workspace packages
    BIN = session.bin


def _run_in_env(session: nox.Session, *command: str) -> None:
    """Runs a program of that environment, with it first on the PATH, as the tests' own commands need it."""
    path = os.pathsep.join([BIN, os.environ["PATH"]])
    session.run(f"{BIN}/{command[0]}", *command[1:], external=True, env={"PATH": path})


def _on_both_cores(session: nox.Session, *options: str) -> None:
    paths = [path for row in SHARED.values() for path in _paths(row)]
    _run_in_env(session, "pytest", "-n", "2", "--dist", "loadfile", *options, *(session.posargs or paths))


@nox.session(python=False, requires=["env"])
def fast(session: nox.Session) -> None:
    """All tests but those marked full, in one environment, on both cores. `nox -s fast -- PATH`: these."""
    _on_both_cores(session, "-m", "not full")


@nox.session(name="slice", python=False, requires=["env"], default=False)
def slice_of_full(session: nox.Session) -> None:
    """Five minutes of the tests marked full; which, the commit decides."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    options = ("--slice-minutes", "5", "--slice-seed", commit, "--no-loadscope-reorder")
    _on_both_cores(session, "-m", "full", *options)


@nox.session(python=False, default=False)
def full(session: nox.Session) -> None:
    """Everything that this machine has the hardware for: each default row in its own environment, and the wheels."""
    for name, row in ROWS.items():
        if row["default"]:
            session.notify(f"tests({name})")
    session.notify("docs")
    session.notify("dist")


@nox.session(python=False, default=False)
def matrix(session: nox.Session) -> None:
    """Prints the rows, and when each was run last, at which commit and on which machine."""
    session.run(sys.executable, "ci/ran.py", external=True)


@nox.session(python=False, requires=["env"], default=False)
def mutations(session: nox.Session) -> None:
    """Whether the fast tier notices wrong lines: ci/mutations.toml. `-- --tier full`, `-- --only loss_scaler`."""
    _run_in_env(session, "python", "ci/mutations.py", *session.posargs)


def _install_core_and_lab(session: nox.Session) -> None:
    session.install("-e", "packages/precision-core", "-e", "packages/precision-lab", BASE["torch"])


@nox.session(python=BASE["python"])
def compare(session: nox.Session) -> None:
    """The main job: train one model in every precision and compare. `nox -s compare -- --help` lists its options."""
    _install_core_and_lab(session)
    session.run("precision", "compare", *session.posargs)


@nox.session(python=BASE["python"])
def doctor(session: nox.Session) -> None:
    """What this machine can run, and what is installed. `nox -s doctor -- --json`."""
    _install_core_and_lab(session)
    session.run("precision", "doctor", *session.posargs)


@nox.session(python=BASE["python"])
def bench(session: nox.Session) -> None:
    """Every benchmarks/bench_*.py, one after another, with this command's arguments."""
    _install_core_and_lab(session)
    for name in ("precision-bnb", "precision-deepspeed", "precision-fsdp", "precision-te"):
        session.install(*_editable(f"packages/{name}"))
    session.install("--group", "packages/precision-bnb/pyproject.toml:bench")
    for script in sorted(ROOT.glob("benchmarks/bench_*.py")):
        session.run("python", str(script.relative_to(ROOT)), *session.posargs)


@nox.session(python=BASE["python"], default=False)
def docs(session: nox.Session) -> None:
    """The site, from docs/ and the packages' READMEs and docstrings, into site/; a broken link is an error."""
    session.install("--group", "docs")
    session.run("mkdocs", "build", "--strict", env={"NO_MKDOCS_2_WARNING": "1"})
    session.run("python", "ci/check_site.py", "site")


@nox.session(python=BASE["python"])
def soak(session: nox.Session) -> None:
    """Reliability tests that take longer than a minute. `-- --times 10`: ten times as many tries."""
    session.install(*_editable("packages/precision-core"), BASE["torch"])
    session.run("pytest", "soak", "-s", *session.posargs)


def _ci(session: nox.Session, script: str) -> None:
    """Runs a script of ci/ with this command's arguments. They need uv, which may not be on the PATH."""
    session.install("uv")
    session.run("python", f"ci/{script}.py", *session.posargs)


@nox.session(python=BASE["python"])
def dist(session: nox.Session) -> None:
    """What users get: each package's wheel, alone, and its tests against that. `-- PACKAGE ...`: these only."""
    _ci(session, "dist")


@nox.session(python=BASE["python"])
def release(session: nox.Session) -> None:
    """Checks that HEAD is a release of one package, and builds it into dist/: `nox -s release -- PACKAGE`."""
    _ci(session, "release")


def _print_table(report: Path) -> None:
    """Row, seconds, budget, result. From nox's own report, so that rows which failed before their first line count."""
    if not report.exists():  # nothing ran: --list, a misspelt name
        return
    table = [("row", "seconds", "budget", "result")]
    for entry in json.loads(report.read_text())["sessions"]:
        name = (entry["signatures"] or [entry["name"]])[0]
        minutes, seconds = BUDGETS.get(name), entry["duration"]
        result = "ran" if entry["result"] == "success" else entry["result"]
        if minutes and seconds > 60 * minutes:
            result += ", over its budget"
        if entry["reason"]:
            result += f": {entry['reason']}"
        table.append((name, f"{seconds:.0f}", f"{minutes} min" if minutes else "-", result))
    if set(nox.options.sessions or ()) <= {name for name, *_ in table}:  # a bare `nox`
        left_out = {name: row["left-out"] for name, row in ROWS.items() if row["left-out"]}
        table += [(f"tests({name})", "-", f"{ROWS[name]['minutes']} min", why) for name, why in left_out.items()]
    report.unlink()
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print()
    for name, seconds, budget, result in table:
        print(f"{name:<{widths[0]}}  {seconds:>{widths[1]}}  {budget:>{widths[2]}}  {result}")


# nox has no hook for its end, but writes a report: print the table from that when the process ends.
REPORT = Path(tempfile.gettempdir(), f"nox-report-{os.getpid()}.json")
nox.options.report = str(REPORT)
atexit.register(_print_table, REPORT)
