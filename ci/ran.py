"""`nox -s matrix`: the rows of ci/matrix.toml, and when each was run last (ci/ran.toml). Python 3.11.

    python ci/ran.py                        # prints the rows
    python ci/ran.py record ROW passed      # what `nox -s "tests(ROW)"` calls at its end
    python ci/ran.py take results.jsonl     # what `python ci/gpu.py` has written on another machine
    python ci/ran.py readmes                # the tables in the packages' READMEs; --check: says where they differ

Only commits are recorded: a run over changes that are in no commit says nothing about any.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from workspace import Problem, repository, run

HEAD = """\
# What ran when: one entry for each row of ci/matrix.toml and each machine, the latest. Written by `nox -s "tests(ROW)"`
# and by `python ci/ran.py take`, over commits alone; read by `nox -s matrix` and for the tables in the READMEs.
"""
KEYS = ("row", "commit", "date", "machine", "result")
BEGIN, END = "<!-- written by ci/ran.py -->", "<!-- until here -->"
OURS = (":!ci/ran.toml", ":!packages/*/README.md", ":!examples/*/README.md")
"""What a run changes itself: it is no change of what ran."""


def machine() -> str:
    """Returns the name of the GPU, where there is one, and of the CPU."""
    return ", ".join(filter(None, [_gpu(), _cpu()]))


def _gpu() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
    except OSError:
        return ""
    found = [name.strip() for name in names if name.strip()]
    return "" if not found else found[0] if len(found) == 1 else f"{len(found)} x {found[0]}"


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else "a CPU without a name"


# -------------------------------------------------------------------- what ran


def rows(root: Path) -> dict[str, dict[str, Any]]:
    """Returns the rows by name, as nox spells it."""
    matrix = tomllib.loads((root / "ci" / "matrix.toml").read_text())
    return {f"{row['package']}/{row['id']}": matrix["base"] | row for row in matrix["row"]}


def entries(root: Path) -> list[dict[str, str]]:
    file = root / "ci" / "ran.toml"
    found: list[dict[str, str]] = tomllib.loads(file.read_text()).get("ran", []) if file.exists() else []
    return found


def write(root: Path, new: list[dict[str, str]]) -> None:
    """Puts the entries in the place of older ones of the same row and machine, in the order of the matrix."""
    known = list(rows(root))
    kept = {(each["row"], each["machine"]): each for each in [*entries(root), *new] if each["row"] in known}
    ordered = sorted(kept.values(), key=lambda each: (known.index(each["row"]), each["machine"]))
    blocks = ["[[ran]]\n" + "".join(f"{key} = {json.dumps(each[key])}\n" for key in KEYS) for each in ordered]
    (root / "ci" / "ran.toml").write_text("\n".join([HEAD, *blocks]))
    update_readmes(root)


def changes(root: Path) -> str:
    """Returns which files differ from the commit; not those that are written by runs."""
    return run("git", "status", "--porcelain", "--untracked-files=no", "--", ".", *OURS, cwd=root).rstrip()


def record(root: Path, row: str, result: str) -> str:
    """Writes that the row ran here now; returns what it did, for the log."""
    if row not in rows(root):
        raise Problem(f"no row is named {row}; `nox -s matrix` prints them")
    if changed := changes(root):
        return f"not recorded in ci/ran.toml: there are changes in no commit\n{changed}"
    commit = run("git", "rev-parse", "--short=8", "HEAD", cwd=root).strip()
    day = time.strftime("%Y-%m-%d")
    write(root, [dict(zip(KEYS, (row, commit, day, machine(), result), strict=True))])
    return f"recorded in ci/ran.toml: {row}: {result}"


def counted(junit: Path) -> str:
    """Returns the numbers of pytest's report: "120 passed, 3 skipped"."""
    suite = ElementTree.parse(junit).getroot().find("testsuite")
    assert suite is not None
    total, skipped, failed = (int(suite.get(key, 0)) for key in ("tests", "skipped", "failures"))
    failed += int(suite.get("errors", 0))
    return ", ".join([f"{total - skipped - failed} passed", *_some(failed, "failed"), *_some(skipped, "skipped")])


def summary(result: str, counts: str) -> str:
    """Returns "120 passed", "failed: 119 passed, 1 failed", or the result alone where nothing was counted."""
    return counts if counts and result == "passed" else ": ".join(filter(None, [result, counts]))


def _some(count: int, word: str) -> list[str]:
    return [f"{count} {word}"] if count else []


def take(root: Path, results: Path) -> list[str]:
    """Records what slices of ci/gpu_slices.toml did elsewhere, for the rows that name them; returns a line for each."""
    begun: dict[str, dict[str, str]] = {}
    new, said = [], []
    for line in results.read_text().splitlines():
        entry = json.loads(line)
        if entry["kind"] == "begin" and "commit" in entry:
            begun[entry["slice"]] = entry
        elif entry["kind"] == "slice":
            at = begun[entry["slice"]]
            counts = ", ".join(f"{count} {word}" for word, count in sorted(entry["tests"].items()))
            result = summary(entry["result"], counts)
            if not re.fullmatch("[0-9a-f]+", at["commit"]):
                said.append(f"not recorded: {entry['slice']}, of {at['commit']}, which is no commit")
                continue
            names = [name for name, row in rows(root).items() if row.get("slice") == entry["slice"]]
            values = (at["commit"], at["day"], at["machine"], result)
            new += [dict(zip(KEYS, (name, *values), strict=True)) for name in names]
            said += [f"{name}: {result}" for name in names]
    write(root, new)
    return said


# -------------------------------------------------------------------- what is printed


def table(root: Path) -> list[tuple[str, ...]]:
    """Returns a line for each row and machine: name, hardware, Python, torch, when it runs, the last run."""
    lines: list[tuple[str, ...]] = [("row", "hardware", "Python", "torch", "by default", "last run")]
    ran = entries(root)
    for name, row in rows(root).items():
        torch = row["torch"].removeprefix("torch").removeprefix("==") or "newest"
        runs = [_run(each) for each in ran if each["row"] == name] or ["no run is recorded"]
        default = "yes" if row["default"] else "no"
        lines += [(name, row["hardware"], row["python"], torch, default, each) for each in runs]
    return lines


def _run(entry: dict[str, str]) -> str:
    return f"{entry['date']}, {entry['commit']}, {entry['machine']}: {entry['result']}"


def block(root: Path, package: str) -> str:
    """Returns the table of a package's README, between its marks."""
    mine = [line for line in table(root)[1:] if line[0].rpartition("/")[0] == package]
    lines = [(name.rpartition("/")[2], python, torch, last) for name, _, python, torch, _, last in mine]
    head = [("row", "Python", "torch", "last run"), ("---",) * 4]
    return "\n".join([BEGIN, *(f"| {' | '.join(line)} |" for line in [*head, *lines]), END])


def readmes(root: Path) -> dict[Path, str]:
    """Returns the READMEs that have such a table, as they should be."""
    found = {}
    for path in sorted([*root.glob("packages/*/README.md"), *root.glob("examples/*/README.md")]):
        before, begin, rest = path.read_text().partition(BEGIN)
        if begin:
            name = path.parent.relative_to(root).as_posix().removeprefix("packages/")
            found[path] = before + block(root, name) + rest.partition(END)[2]
    return found


def update_readmes(root: Path) -> None:
    for path, text in readmes(root).items():
        path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parsers = parser.add_subparsers(dest="what")
    recorder = parsers.add_parser("record", help="that a row ran")
    recorder.add_argument("row")
    recorder.add_argument("result", help="passed, failed")
    recorder.add_argument("--junit", type=Path, help="pytest's report, for the numbers")
    parsers.add_parser("take", help="what ran elsewhere").add_argument("results", type=Path)
    parsers.add_parser("readmes", help="writes the tables").add_argument("--check", action="store_true")
    given = parser.parse_args()
    try:
        root = repository()
        if given.what == "record":
            counts = counted(given.junit) if given.junit and given.junit.exists() else ""
            print(record(root, given.row, summary(given.result, counts)))
        elif given.what == "take":
            print(*take(root, given.results), sep="\n")
        elif given.what == "readmes" and given.check:
            if wrong := [
                str(path.relative_to(root)) for path, text in readmes(root).items() if path.read_text() != text
            ]:
                raise Problem(f"{', '.join(wrong)} say something else than ci/ran.toml: `python ci/ran.py readmes`")
        elif given.what == "readmes":
            update_readmes(root)
        else:
            lines = table(root)
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            print(*("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines), sep="\n")
    except Problem as problem:
        sys.exit(f"ran: {problem}")


if __name__ == "__main__":
    main()
