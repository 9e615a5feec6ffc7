"""The slices of ci/gpu_slices.toml: what each runs and installs, and the wheels that it brings. Python 3.11."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from ran import changes
from workspace import Problem, distribution, run

ROOT = Path(__file__).parents[1]
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 24, 17)] + ["manylinux2014_x86_64"]
COMMIT = "commit"
"""The file beside the wheels that says what they were built from."""


@dataclass(frozen=True)
class Step:
    """A command, or pytest's arguments."""

    name: str
    tests: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def line(self, out: Path) -> list[str]:
        if self.tests:
            return [sys.executable, "-m", "pytest", "-q", "-pgpu_results", "-p", "no:cacheprovider", *self.tests]
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

    def missing(self) -> list[str]:
        """Returns the modules that it requires and the image lacks."""
        return [name for name in self.requires if importlib.util.find_spec(name) is None]


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
    (plan.wheels / COMMIT).write_text(_commit())
    size = sum(file.stat().st_size for file in plan.wheels.iterdir()) / 2**20
    print(f"{plan.wheels}: {len(list(plan.wheels.glob('*.whl')))} wheels, {size:.0f} MiB")
    if size > plan.most_mib:
        raise Problem(f"that is more than {plan.most_mib} MiB: bring less")


def _commit() -> str:
    return run("git", "rev-parse", "--short=8", "HEAD", cwd=ROOT).strip() + ("+changes" if changes(ROOT) else "")


def commit_of(plan: Plan) -> str:
    """Returns the commit that the wheels were built from; else that of the checkout, if git is there."""
    noted = plan.wheels / COMMIT
    try:
        return noted.read_text() if noted.exists() else _commit()
    except (Problem, OSError):
        return "unknown"
