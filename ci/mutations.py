"""`python ci/mutations.py`: do the tests notice a wrong line? Python 3.11, in an environment that runs all tests.

Each entry of ci/mutations.toml is a line of the sources and what it becomes. Each is applied to a copy of the checkout,
in which its tests run: the fast tier (`-m "not full"`) has to fail for 90 % of them, the full one for all, less those
that are known to survive. A line that is no longer found is an error, so that the file moves with the code.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workspace import Problem, repository, run

SHARE = {"fast": 0.9, "full": 1.0}  # of the mutations that the tests can kill, how many a tier has to
WORDS = {True: "killed", False: "survived", None: "error"}
OPTIONS = ("-x", "-q", "-rfE", "-p", "no:cacheprovider", "-p", "no:randomly")


@dataclass(frozen=True)
class Mutation:
    """One [[mutation]] of ci/mutations.toml, which says what the fields are."""

    number: int
    file: str
    line: str
    becomes: str
    what: str
    tests: list[str]
    nth: int | None = None
    survives: bool = False
    row: str | None = None

    def __str__(self) -> str:
        return f"{self.number:3} {self.file}: {self.what}"

    def applied(self, root: Path) -> str:
        """Returns the file's text with the line replaced."""
        lines = (root / self.file).read_text().splitlines(keepends=True) if (root / self.file).is_file() else []
        found = [index for index, text in enumerate(lines) if text.strip() == self.line]
        if len(found) < (self.nth or 1) or (len(found) > 1 and not self.nth):
            raise Problem(f"mutation {self.number}: {len(found)} lines of {self.file} read {self.line!r}")
        index = found[(self.nth or 1) - 1]
        lines[index] = lines[index].replace(self.line, self.becomes)
        return "".join(lines)


def read(root: Path) -> list[Mutation]:
    """Returns what ci/mutations.toml lists, once each line and each test is found, and what it becomes is Python."""
    found = []
    for number, entry in enumerate(tomllib.loads((root / "ci" / "mutations.toml").read_text())["mutation"], 1):
        try:
            mutation = Mutation(number, **entry)
            ast.parse(mutation.applied(root))
        except (TypeError, SyntaxError) as error:
            raise Problem(f"mutation {number}: {error}") from None
        if missing := [test for test in mutation.tests or [""] if not (root / test).is_file()]:
            raise Problem(f"mutation {number}: there is no test file {missing[0]!r}")
        found.append(mutation)
    return found


def copy(root: Path, to: Path) -> Path:
    """Copies what git has or would take, as it lies here."""
    for name in run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=root).split("\0"):
        if (root / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, to / name)
    return to


class Run:
    """The tests of a mutation on a copy, in a process group of its own of which nothing is left."""

    def __init__(self, mutation: Mutation, root: Path, tier: str) -> None:
        self.mutation, self.root, self._tier = mutation, root, tier
        self._path = root / mutation.file
        self._before = self._path.read_text()
        self._path.write_text(mutation.applied(root))
        sources = sorted(map(str, [*root.glob("packages/*/src"), *root.glob("examples/*/src")]))
        paths = os.pathsep.join([*sources, *filter(None, [os.environ.get("PYTHONPATH")])])
        # No bytecode: where a line keeps its length, a mutation in the same second would run what was there before.
        variables = os.environ | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", *OPTIONS, f"--basetemp={root}.temporary", *mutation.tests]
        command += ["-m", "not full"] if tier == "fast" else []
        self._printed = root.with_suffix(".txt")  # no pipe, which a process that is left over would keep open
        with self._printed.open("w") as file:
            options: dict[str, Any] = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
            self._process = subprocess.Popen(command, cwd=root, env=variables, **options)
        self.poll, self.start = self._process.poll, time.monotonic()

    def end(self) -> None:
        self._ended = self.poll() is None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._path.write_text(self._before)

    def result(self) -> tuple[bool | None, str]:
        """Returns whether the mutation is killed, None where that cannot be said, and by what."""
        said, status = self._printed.read_text(errors="replace"), self._process.returncode
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
        if status == 0 or (status == 5 and self._tier == "fast"):  # 5: none of its tests is in the tier
            return False, "no test"
        if status in (1, 2) or (status == 4 and "while loading conftest" in said):  # 2: while collecting
            return True, failed[1] if failed else f"pytest's exit status {status}"
        if status < 0:
            return True, "the time limit" if self._ended else f"signal {-status}"
        return None, f"pytest's exit status {status}:\n{said[-2000:]}"


def run_all(mutations: list[Mutation], root: Path, tier: str, limit: float, jobs: int) -> dict[int, bool | None]:
    """Returns by number whether each is killed, and prints it as it goes."""
    results, waiting, running = {}, mutations[::-1], list[Run]()
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copies = [copy(root, Path(folder, str(job))) for job in range(jobs)]
        try:
            while waiting or running:
                while waiting and copies:
                    running.append(Run(waiting.pop(), copies.pop(), tier))
                time.sleep(0.1)
                for each in list(running):
                    seconds = time.monotonic() - each.start
                    if each.poll() is not None or seconds > limit:
                        each.end()
                        running.remove(each)
                        copies.append(each.root)
                        killed, by = each.result()
                        results[each.mutation.number] = killed
                        print(f"{WORDS[killed]:8} {seconds:4.0f} s {each.mutation} (by {by})", flush=True)
        finally:
            for each in running:
                each.end()
    return results


def report(mutations: list[Mutation], results: dict[int, bool | None], tier: str) -> None:
    """Prints the table; raises `Problem` where the tier does not kill enough."""
    print(f"\n{'package':<22}   number   killed survived")
    packages = {each.number: Path(each.file).parts[1] for each in mutations}
    for package in sorted(set(packages.values())):
        killed = [results[number] for number, its in packages.items() if its == package]
        print(f"{package:<22} {len(killed):8} {killed.count(True):8} {killed.count(False):8}")
    for each in mutations:
        if results[each.number] is False:
            print(f"survived {each}{' (known)' if each.survives else ''}")
    if unclear := [str(number) for number, killed in results.items() if killed is None]:
        raise Problem(f"the tests of {', '.join(unclear)} could not run")
    killed = [results[each.number] for each in mutations if not each.survives]
    print(f"{killed.count(True)} are killed of {len(killed)} that all tests can kill")
    if killed.count(True) < SHARE[tier] * len(killed):
        raise Problem(f"the {tier} tier has to kill {SHARE[tier]:.0%} of those")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--tier", choices=SHARE, default="fast", help="default: fast")
    parser.add_argument("--only", default="", metavar="N,M|TEXT", help="these, or those with this in their file's path")
    parser.add_argument("--jobs", type=int, default=2, help="how many at once; default: 2")
    parser.add_argument("--seconds", type=float, default=300, help="a run that takes longer is killed; default: 300")
    parser.add_argument("--row", help="those of this row of the matrix, which this environment is")
    parser.add_argument("--check", action="store_true", help="only check that every line is found")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("mutations: ended"))  # leaves no test running
    try:
        root = repository()
        only, numbers = arguments.only, re.fullmatch(r"[\d,]+", arguments.only)
        asked = [each for each in read(root) if (f",{each.number}," in f",{only}," if numbers else only in each.file)]
        if arguments.check:
            print(f"{len(asked)} mutations, every line is found")
            return
        here = [each for each in asked if each.row == arguments.row]
        mutations = [each for each in here if not each.survives or arguments.tier == "full"]
        for each in asked:
            if each not in mutations:
                why = each.row or ("of no row" if arguments.row else "known to survive")
                print(f"skipped         {each} ({why})")
        results = run_all(mutations, root, arguments.tier, arguments.seconds, arguments.jobs)
        report(mutations, results, arguments.tier)
    except Problem as problem:
        sys.exit(f"mutations: {problem}")


if __name__ == "__main__":
    main()
