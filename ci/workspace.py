"""What the scripts in ci/ share: the repository's packages, as their pyproject.toml say, and git. Python 3.11."""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Problem(Exception):
    """What the user is told, without a traceback."""


def distribution(requirement: str) -> str:
    """Returns the normalised name in `name[extra]>=1`."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement.strip())[0]).lower()


@dataclass(frozen=True)
class Package:
    """One pyproject.toml."""

    folder: Path
    name: str
    version: str
    requires: tuple[str, ...]
    extras: dict[str, list[str]]
    groups: dict[str, list[Any]]

    @property
    def import_name(self) -> str:
        return self.name.replace("-", "_")

    @classmethod
    def read(cls, folder: Path) -> Package:
        table = tomllib.loads((folder / "pyproject.toml").read_text())
        project = table["project"]
        requires, extras = project.get("dependencies", []), project.get("optional-dependencies", {})
        groups = table.get("dependency-groups", {})
        return cls(folder, distribution(project["name"]), project["version"], tuple(requires), extras, groups)


def packages(root: Path, pattern: str = "packages/*") -> dict[str, Package]:
    found = [Package.read(path.parent) for path in sorted(root.glob(f"{pattern}/pyproject.toml"))]
    return {package.name: package for package in found}


def named(known: dict[str, Package], names: Iterable[str]) -> list[Package]:
    if unknown := [name for name in names if name not in known]:
        what = f"no package is named {', '.join(unknown)}" if any(unknown) else "name a package"
        raise Problem(f"{what}; there are: {', '.join(known)}")
    return [known[name] for name in names]


def run(*command: str | Path, cwd: Path, **options: Any) -> str:
    """Returns what the command printed; one that fails is a Problem with what it said."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, errors="surrogateescape", **options)
    if done.returncode:
        said = (done.stdout + done.stderr).strip()
        raise Problem(f"{' '.join(map(str, command))} failed with exit status {done.returncode}:\n{said}")
    return done.stdout


def repository() -> Path:
    """Returns the root of the git repository around the working directory."""
    return Path(run("git", "rev-parse", "--show-toplevel", cwd=Path.cwd()).rstrip("\n"))
