"""`python ci/gpu.py SLICE ...`: runs slices of ci/gpu_slices.toml on a GPU image without network. Python 3.11.

    python ci/gpu.py --build              # where there is network: the wheels to bring along
    python ci/gpu.py --list
    python ci/gpu.py core deepspeed       # in the order of the file
    python ci/gpu.py --dry-run            # what all slices (or these) would run, as a shell script
    python ci/ran.py take results.jsonl   # back in the checkout: what ran, for ci/ran.toml and the READMEs

It needs nothing but Python and pip. Each result is appended to results.jsonl in the folder of --out (default: $OUT) as
soon as it is there: a line for each test, each step, and the slice. A slice ends by itself when its minutes are over.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_plan import ROOT, Plan, Slice, Step, build, commit_of, install_line
from gpu_results import append
from ran import machine
from workspace import Problem

VARIABLES = {
    "PIP_BREAK_SYSTEM_PACKAGES": "1",  # an image is thrown away
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # those of an image are not ours, and warnings are errors here
    "PYTHONUNBUFFERED": "1",
}
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 24, 17)] + ["manylinux2014_x86_64"]

OUT_OF_TIME, ENDED = "out of time", "ended from outside"


class Ended(Exception):
    """The time is over, or somebody ended this process."""


class Run:
    """One slice that runs: its deadline, and where its results go."""

    def __init__(self, plan: Plan, one: Slice, out: Path) -> None:
        self.plan, self.slice, self.out = plan, one, out
        self.deadline = time.monotonic() + 60 * one.minutes
        self.results = out / "results.jsonl"
        self.start = self.results.stat().st_size if self.results.exists() else 0  # of this run, in the file

    def write(self, kind: str, **entry: object) -> None:
        append(str(self.results), kind=kind, slice=self.slice.name, **entry)
        if kind != "begin":
            print(" ".join(f"{key}={value}" for key, value in entry.items() if key != "log"), flush=True)
            if str(entry["result"]).startswith("failed"):
                print(*str(entry.get("log", "")).splitlines()[-12:], sep="\n", flush=True)

    def steps(self) -> Iterator[Step]:
        if missing := self.slice.missing():
            raise Problem(f"the image has no {', '.join(missing)}")
        if line := install_line(self.plan, self.slice):
            yield Step("install", command=line)
        yield from self.slice.steps

    def run(self) -> str:
        """Runs the steps in their order, and returns the slice's result."""
        begun, results, here = time.monotonic(), [], machine()
        self.write("begin", commit=commit_of(self.plan), machine=here, day=time.strftime("%Y-%m-%d"))
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
        env = {**os.environ, **VARIABLES, **names, "PYTHONPATH": path, "PATH": scripts, **step.environment}
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
        lines = self.results.read_bytes()[self.start :].splitlines()
        mine = [each for each in map(json.loads, lines) if each["kind"] == "test" and each["step"] == step]
        return Counter(each["result"] for each in mine)


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


def script(plan: Plan, slices: list[Slice], out: Path) -> Iterator[str]:
    """Yields the lines of a shell script that runs what the slices run, less their deadlines and results.jsonl."""
    minutes = sum(each.minutes for each in slices)
    yield f"# {len(slices)} slices, at most {minutes:g} minutes, of commit {commit_of(plan)}, on {machine()}"
    if not list(plan.wheels.glob("*.whl")):
        yield f"# no wheels in {plan.wheels}: python ci/gpu.py --build, where there is network"
    variables = " ".join(f"{name}={value}" for name, value in VARIABLES.items())
    yield f"cd {shlex.quote(str(ROOT))}; python={shlex.quote(sys.executable)}; export {variables}"
    yield f"export PATH={shlex.quote(sysconfig.get_path('scripts'))}:$PATH; mkdir -p {shlex.quote(str(out))}"
    for each in slices:
        yield f"\n# {each.name}: {each.minutes:g} minutes"
        mark = ""
        if missing := each.missing():
            mark = "# "
            yield f"# left out here, where there is no {', '.join(missing)}"
        for step in [Step("install", command=install_line(plan, each)), *each.steps]:
            line = [word for word in step.line(out) if word != "-pgpu_results"]  # which writes results.jsonl
            if line:
                python, words = ("$python ", line[1:]) if line[0] == sys.executable else ("", line)
                before = "".join(f"{name}={shlex.quote(value)} " for name, value in step.environment.items())
                yield f"{mark}{before}{python}{shlex.join(words)}    # {step.name}"


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
        if given.dry_run:
            print(*script(plan, chosen or plan.slices, given.out or Path(os.environ.get("OUT") or "results")), sep="\n")
            return
        if not chosen:
            raise Problem(f"name a slice; there are: {', '.join(each.name for each in plan.slices)}")
        out = given.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else None)
        if out is None:
            raise Problem("name a folder for the results: --out FOLDER, or the variable OUT")
        out.mkdir(parents=True, exist_ok=True)
        results = []
        for each in chosen:
            results.append(Run(plan, each, out).run())
            if results[-1] == ENDED:
                break
    except Problem as problem:
        sys.exit(f"gpu: {problem}")
    sys.exit(any(result != "passed" for result in results))


if __name__ == "__main__":
    main()
