"""`python ci/gpu.py SLICE ...`: runs slices of ci/gpu_slices.toml on a GPU image without network. Python 3.11.

    python ci/gpu.py --build              # where there is network: the wheels to bring along
    python ci/gpu.py --list
    python ci/gpu.py core deepspeed       # in the order of the file; --dry-run: says what it would run
    python ci/ran.py take results.jsonl   # back in the checkout: what ran, for ci/ran.toml and the READMEs

It needs nothing but Python and pip. Each result is appended to results.jsonl in the folder of --out (default: $OUT) as
soon as it is there: a line for each test, each step, and the slice. A slice ends by itself when its minutes are over.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_results import append
from ran import machine

from workspace import Problem, distribution, run

ROOT = Path(__file__).parents[1]
OFFLINE = {"PIP_BREAK_SYSTEM_PACKAGES": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUNBUFFERED": "1"}
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 24, 17)] + ["manylinux2014_x86_64"]

OUT_OF_TIME, ENDED = "out of time", "ended from outside"


class Ended(Exception):
    """The time is over, or somebody ended this process."""


@dataclass(frozen=True)
class Step:
    """A command, or pytest's arguments."""

    name: str
    tests: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def line(self, out: Path) -> list[str]:
        if self.tests:
            return [sys.executable, "-m", "pytest", "-q", "-p", "gpu_results", "-p", "no:cacheprovider", *self.tests]
        return [word.replace("{python}", sys.executable).replace("{out}", str(out)) for word in self.command]


@dataclass(frozen=True)
class Slice:
    """What runs in one go."""

    name: str
    minutes: float
    installs: list[str]
    brings: list[str]
    requires: list[str]
    steps: list[Step]


@dataclass(frozen=True)
class Plan:
    """The file of slices, in its order."""

    wheels: Path
    python: str
    most_mib: int
    brings: dict[str, list[str]]
    slices: list[Slice]

    @classmethod
    def read(cls, path: Path) -> Plan:
        table = tomllib.loads(path.read_text())
        slices = []
        for each in table["slice"]:
            steps = [Step(**step) for step in each["steps"]]
            slices.append(Slice(**{"installs": [], "brings": [], "requires": [], **each, "steps": steps}))
        wheels = path.parents[1] / table["wheels"]
        return cls(wheels, table["python"], table["most-mib"], table.get("brings", {}), slices)

    def chosen(self, names: list[str]) -> list[Slice]:
        """Returns the slices with these names in the order of the file, whatever the order of the names."""
        known = [each.name for each in self.slices]
        if unknown := [name for name in names if name not in known]:
            raise Problem(f"no slice is named {', '.join(unknown)}; there are: {', '.join(known)}")
        return [each for each in self.slices if each.name in names]

    def brought(self, one: Slice) -> list[str]:
        return [requirement for name in one.brings for requirement in self.brings[name]]


def _is_installed(requirement: str) -> bool:
    """Whether the image has it, in any version."""
    try:
        importlib.metadata.distribution(distribution(requirement))
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def install_line(plan: Plan, one: Slice) -> list[str]:
    """Returns the command that installs our wheels, and those of others that the image lacks; [] where nothing is."""
    wanted = [*one.installs, *(each for each in plan.brought(one) if not _is_installed(each))]
    if not wanted:
        return []
    options = ["--quiet", "--force-reinstall", "--no-deps", "--no-index", "--find-links", str(plan.wheels)]
    return [sys.executable, "-m", "pip", "install", *options, *dict.fromkeys(wanted)]


class Run:
    """One slice that runs: its deadline, and where its results go."""

    def __init__(self, plan: Plan, one: Slice, out: Path) -> None:
        self.plan, self.slice, self.out = plan, one, out
        self.deadline = time.monotonic() + 60 * one.minutes
        self.results = out / "results.jsonl"

    def write(self, kind: str, **entry: object) -> None:
        append(str(self.results), kind=kind, slice=self.slice.name, **entry)
        if kind != "begin":
            print(" ".join(f"{key}={value}" for key, value in entry.items() if key != "log"), flush=True)

    def steps(self) -> Iterator[Step]:
        if missing := [name for name in self.slice.requires if importlib.util.find_spec(name) is None]:
            raise Problem(f"the image has no {', '.join(missing)}")
        if line := install_line(self.plan, self.slice):
            yield Step("install", command=line)
        yield from self.slice.steps

    def run(self) -> str:
        """Runs the steps in their order, and returns the slice's result."""
        begun, results, here = time.monotonic(), [], machine()
        self.write("begin", commit=_commit(self.plan), machine=here, day=time.strftime("%Y-%m-%d"))
        left = [step.name for step in self.slice.steps]
        try:
            for step in self.steps():
                left = [name for name in left if name != step.name]
                results.append(self._step(step))
                if step.name == "install" and results[-1] != "passed":
                    break
        except Ended as ended:
            results.append(str(ended))
        except Problem as problem:
            results.append(f"left out: {problem}")
        for name in left:
            self.write("step", step=name, result="not begun")
        odd = [result for result in results if result != "passed"]
        result = odd[0] if odd else "passed"
        tests = dict(sum((self._tests(step.name) for step in self.slice.steps), Counter()))
        self.write("slice", result=result, seconds=round(time.monotonic() - begun), tests=tests)
        return result

    def _step(self, step: Step) -> str:
        begun = time.monotonic()
        log = self.out / f"{self.slice.name}.log"
        self.write("begin", step=step.name)
        with log.open("ab") as file:
            start = file.tell()
            file.write(f"\n== {step.name}: {shlex.join(step.line(self.out))}\n".encode())
            file.flush()
            try:
                result = self._command(step, file)
            except Ended as ended:
                result = str(ended)
        if result == "passed" and step.tests and not self._tests(step.name)["passed"]:
            result = "skipped"
        with log.open("rb") as file:
            file.seek(max(start, log.stat().st_size - 4000))
            tail = file.read().decode(errors="replace")
        tests, seconds = dict(self._tests(step.name)), round(time.monotonic() - begun, 1)
        self.write("step", step=step.name, result=result, seconds=seconds, tests=tests, log=tail)
        if result in (OUT_OF_TIME, ENDED):
            raise Ended(result)
        return result

    def _command(self, step: Step, file: Any) -> str:
        names = {"GPU_RESULTS": str(self.results), "GPU_SLICE": self.slice.name, "GPU_STEP": step.name}
        path = os.pathsep.join([str(ROOT / "ci"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        scripts = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        env = {**os.environ, **OFFLINE, **names, "PYTHONPATH": path, "PATH": scripts, **step.environment}
        left = self.deadline - time.monotonic()
        if left <= 0:
            return OUT_OF_TIME
        try:
            options: dict[str, Any] = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
            process = subprocess.Popen(step.line(self.out), cwd=ROOT, env=env, **options)
        except OSError as error:
            return f"failed: {error.strerror}"
        try:
            status = process.wait(left)
        except subprocess.TimeoutExpired:
            return OUT_OF_TIME
        finally:
            _end(process)
        return "passed" if status == 0 else f"failed: exit status {status}"

    def _tests(self, step: str) -> Counter[str]:
        lines = [json.loads(line) for line in self.results.read_text().splitlines()]
        mine = [each for each in lines if each["kind"] == "test" and each["slice"] == self.slice.name]
        return Counter(each["result"] for each in mine if each["step"] == step)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends what the step has started, all of it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(2)
        except (ProcessLookupError, PermissionError):
            return
        except subprocess.TimeoutExpired:
            continue


def _commit(plan: Plan) -> str:
    """Returns the commit that the wheels were built from; else that of the checkout, if git is there."""
    noted = plan.wheels / "commit"
    try:
        return noted.read_text() if noted.exists() else run("git", "rev-parse", "--short=8", "HEAD", cwd=ROOT).strip()
    except (Problem, OSError):
        return "unknown"


def build(plan: Plan) -> None:
    """Builds our wheels, and fetches those that the image lacks, into the folder of wheels."""
    plan.wheels.mkdir(parents=True, exist_ok=True)
    for old in plan.wheels.glob("*.whl"):
        old.unlink()
    pip = (sys.executable, "-m", "pip")
    ours = dict.fromkeys(name for each in plan.slices for name in each.installs)
    run(
        *pip, "wheel", "--quiet", "--no-deps", "-w", plan.wheels, *(ROOT / "packages" / name for name in ours), cwd=ROOT
    )
    tags = [option for platform in PLATFORMS for option in ("--platform", platform)]
    options = ("--quiet", "--no-deps", "--only-binary=:all:", "--python-version", plan.python, *tags)
    for requirement in dict.fromkeys(each for group in plan.brings.values() for each in group):
        try:
            run(*pip, "download", *options, "-d", plan.wheels, requirement, cwd=ROOT)
        except Problem:  # no wheel is published: one of pure Python is built here
            run(*pip, "wheel", "--quiet", "--no-deps", "-w", plan.wheels, requirement, cwd=ROOT)
    (plan.wheels / "commit").write_text(run("git", "rev-parse", "--short=8", "HEAD", cwd=ROOT).strip())
    size = sum(file.stat().st_size for file in plan.wheels.iterdir()) / 2**20
    print(f"{plan.wheels}: {len(list(plan.wheels.glob('*.whl')))} wheels, {size:.0f} MiB")
    if size > plan.most_mib:
        raise Problem(f"that is more than {plan.most_mib} MiB: bring less")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("slice", nargs="*", help="see --list")
    parser.add_argument("--out", type=Path, help="folder for results; default: $OUT")
    parser.add_argument("--slices", type=Path, default=ROOT / "ci" / "gpu_slices.toml", help="another file of slices")
    for option in ("--list", "--dry-run", "--build"):
        parser.add_argument(option, action="store_true")
    given = parser.parse_args()

    def ended(*_: object) -> None:
        raise Ended(ENDED)

    signal.signal(signal.SIGTERM, ended)
    try:
        plan = Plan.read(given.slices)
        if given.list:
            for each in plan.slices:
                print(f"{each.name:<10} {each.minutes:>4g} min  {', '.join(step.name for step in each.steps)}")
            return
        if given.build:
            return build(plan)
        chosen = plan.chosen(given.slice)
        if not chosen:
            raise Problem(f"name a slice; there are: {', '.join(each.name for each in plan.slices)}")
        out = given.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else None)
        if given.dry_run:
            for each in chosen:
                print(f"# {each.name}: {each.minutes:g} minutes")
                lines = [install_line(plan, each), *(step.line(out or Path("$OUT")) for step in each.steps)]
                print(*(shlex.join(line) for line in lines if line), sep="\n")
            return
        if out is None:
            raise Problem("name a folder for the results: --out FOLDER, or the variable OUT")
        out.mkdir(parents=True, exist_ok=True)
        results = [Run(plan, each, out).run() for each in chosen]
    except Problem as problem:
        sys.exit(f"gpu: {problem}")
    sys.exit(any(result != "passed" for result in results))


if __name__ == "__main__":
    main()
