"""`python ci/affected.py [BASE]`: the nox tags of what a change touches, for `nox -t`. Python 3.11.

The change is everything between the commit where the branch left BASE and the files as they lie here, uncommitted and
untracked ones included. BASE is origin/main where there is one, else the commit before. Prints nothing where no row is
affected; `nox -t` with no tag is an error, so mind that case.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from workspace import Package, Problem, distribution, packages, repository, run

INTEGRATION = "tests-integration"
DOCUMENTS = {"BENCHMARKS.md", "CONTRIBUTING.md", "LICENSE"}  # no row's tests read them


def _commit(root: Path, name: str) -> str | None:
    try:
        return run("git", "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", cwd=root).strip()
    except Problem:
        return None


def start(root: Path, base: str | None) -> str:
    """Returns the commit that the change starts from."""
    if base is None:
        base = "origin/main" if _commit(root, "origin/main") else "HEAD~1"
    if _commit(root, base) is None:
        raise Problem(f"git knows no commit {base!r} here: name the one to compare with, `python ci/affected.py BASE`")
    try:
        return run("git", "merge-base", base, "HEAD", cwd=root).strip()
    except Problem:
        raise Problem(f"{base!r} and HEAD have no commit in common here (a shallow clone?)") from None


def changed(root: Path, since: str) -> list[PurePosixPath]:
    """Returns the paths that differ, relative to the root; a renamed file counts with both of its names."""
    differing = run("git", "diff", "--name-only", "--no-renames", "-z", since, cwd=root)
    untracked = run("git", "ls-files", "--others", "--exclude-standard", "-z", cwd=root)
    return [PurePosixPath(path) for path in (differing + untracked).split("\0") if path]


def _requires(package: Package) -> set[str]:
    # A row installs the test group too. Extras are left out: core's name its own dependants.
    grouped = [each for group in package.groups.values() for each in group if isinstance(each, str)]
    return {distribution(each) for each in [*package.requires, *grouped]}


def affected(root: Path, paths: Iterable[PurePosixPath]) -> set[str]:
    """Returns the folders under the root whose rows are affected, as a row's `package` names them."""
    members = {**packages(root), **packages(root, "examples/*")}
    rows = {name: each.folder.relative_to(root).as_posix().removeprefix("packages/") for name, each in members.items()}
    everything = {*rows.values(), INTEGRATION}
    names = {each.folder: name for name, each in members.items()}
    touched, integration = set(), False
    for path in paths:
        match path.parts:
            case ["packages" | "examples" as top, folder, _, *_]:
                touched.add(names.get(root / top / folder, folder))  # a removed one: its dependants still name it
                integration = True
            case ["tests-integration" | "examples", *_]:
                integration = True
            case [top, *_] if top in DOCUMENTS:
                pass
            # which the tests over several packages read
            case ["benchmarks" | "docs", *_] | ["ci", "ran.toml"] | ["README.md"] | ["mkdocs.yml"]:
                integration = True
            case _:  # noxfile.py, ci/, the root's pyproject.toml; and what nobody has thought of
                return everything
    reached: set[str] = set()
    while touched - reached:
        reached |= touched
        touched = {name for name, package in members.items() if _requires(package) & reached}
    return {rows[name] for name in reached if name in rows} | ({INTEGRATION} if integration else set())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("base", nargs="?", metavar="BASE", help="default: origin/main, else HEAD~1")
    base = parser.parse_args().base
    try:
        root = repository()
        found = affected(root, changed(root, start(root, base)))
    except Problem as problem:
        sys.exit(f"affected: {problem}")
    rows = tomllib.loads((root / "ci" / "matrix.toml").read_text())["row"]
    if tags := sorted(found & {row["package"] for row in rows}):  # what has no row has no tag
        print(*tags)


if __name__ == "__main__":
    main()
