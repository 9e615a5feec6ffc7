"""`nox -s release -- PACKAGE [--out FOLDER]`: checks that HEAD is a release of one package, and builds it. Python 3.11.

The version in pyproject.toml, the top heading of CHANGELOG.md and the tag must say the same. What is built is the
commit, not the folder: a file that git ignores cannot slip in. Nothing is tagged and nothing is published here.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import sys
import tempfile
from datetime import date
from pathlib import Path

from workspace import Package, Problem, distribution, named, packages, repository, run


def check_clean(root: Path) -> None:
    if status := run("git", "status", "--porcelain", cwd=root).rstrip():
        raise Problem(f"the tree is not clean; commit, or remove:\n{status}")


def check_heading(changelog: str, version: str) -> None:
    """The top heading must be this version's, with the day of its release and something below it."""
    wanted = f"## {version} (YYYY-MM-DD)"
    parts = re.split(r"^## *(.*?) *$", changelog, flags=re.MULTILINE)
    if len(parts) < 3:
        raise Problem(f"CHANGELOG.md has no heading: it needs `{wanted}`")
    heading, entries = parts[1], parts[2]
    match = re.fullmatch(rf"{re.escape(version)} \((\d{{4}}-\d\d-\d\d)\)", heading)
    if not match:
        raise Problem(f"CHANGELOG.md: the top heading is `## {heading}`, but this release's is `{wanted}`")
    try:
        date.fromisoformat(match[1])
    except ValueError:
        raise Problem(f"CHANGELOG.md: `## {heading}` has no day of the calendar") from None
    if not entries.strip():
        raise Problem(f"CHANGELOG.md: nothing stands under `## {heading}`")


def check_tag(root: Path, package: Package) -> str | None:
    """Returns the tag of this release if HEAD carries it."""
    if not re.fullmatch(r"\d+\.\d+\.\d+", package.version):
        raise Problem(f"{package.name}: {package.version!r} is no version of the form X.Y.Z")
    tag = f"{package.name}-v{package.version}"
    ours = re.compile(rf"{re.escape(package.name)}-v\d.*")
    here = [each for each in run("git", "tag", "--points-at", "HEAD", cwd=root).split() if ours.fullmatch(each)]
    if wrong := [each for each in here if each != tag]:
        raise Problem(f"HEAD is tagged {', '.join(wrong)}, but pyproject.toml says {package.version}")
    if not here and run("git", "tag", "--list", tag, cwd=root):
        commit = run("git", "rev-list", "-1", "--abbrev-commit", tag, cwd=root).strip()
        raise Problem(f"{tag} exists already, on another commit ({commit}): raise the version in pyproject.toml")
    return tag if here else None


def build(root: Path, name: str, out: Path) -> list[Path]:
    """Builds the sdist from HEAD, the wheel from the sdist, and returns both."""
    with tempfile.TemporaryDirectory() as scratch:
        archive, tree, built = (Path(scratch, each) for each in ("head.tar", "tree", "built"))
        run("git", "archive", "--output", archive, "HEAD", cwd=root)
        shutil.unpack_archive(archive, tree)
        run("uv", "build", "--package", name, "--no-sources", "--out-dir", built, cwd=tree)
        out.mkdir(parents=True, exist_ok=True)
        return [Path(shutil.copy(path, out)) for path in sorted(built.glob(f"{name.replace('-', '_')}-*"))]


def release(root: Path, name: str, out: Path) -> None:
    known = packages(root)
    (package,) = named(known, [name])
    check_clean(root)
    changelog = package.folder / "CHANGELOG.md"
    check_heading(changelog.read_text() if changelog.exists() else "", package.version)
    tag = check_tag(root, package)
    head = run("git", "rev-parse", "--short", "HEAD", cwd=root).strip()
    print(f"{package.name} {package.version} from {head}: {f'tagged {tag}' if tag else 'not tagged yet'}")
    files = build(root, package.name, out)
    for file in files:
        print(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file}")
    steps = [f"nox -s dist -- {package.name}"]
    if siblings := [each for each in package.requires if distribution(each) in known]:
        steps.insert(0, f"see that users can get {', '.join(siblings)}")
    if not tag:
        tag = f"{package.name}-v{package.version}"
        steps.append(f"git tag -a {tag} -m '{package.name} {package.version}' {head}")
    steps += [f"git push origin {tag}", f"uv publish {' '.join(map(str, files))}"]
    print("next:", *steps, sep="\n  ")


def main() -> None:
    parser = argparse.ArgumentParser(prog="nox -s release --", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("package", nargs="?", default="")
    parser.add_argument("--out", type=Path, default=Path("dist"), help="default: %(default)s")
    arguments = parser.parse_args()
    try:
        release(repository(), arguments.package, arguments.out)
    except Problem as problem:
        sys.exit(f"release: {problem}")


if __name__ == "__main__":
    main()
