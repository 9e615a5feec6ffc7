"""`nox -s dist [-- PACKAGE ...]`: what users get. Python 3.11.

Builds every package's sdist and its wheel from that. Then, for each package and outside of the checkout: its wheel
alone with what it requires, in a fresh environment, siblings from the wheels just built; what that brought; its extras;
its tests, against the installed wheel.
"""

from __future__ import annotations

import argparse
import email
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from workspace import Package, Problem, distribution, named, packages, repository, run

# What core may require is a promise of ours, so it stands here and is not read from core's metadata.
PROMISED = {"precision-core": ["torch"]}

# The tests lie in the checkout, what they test must not: afterwards everything that was imported is looked at.
PYTEST = """
import sys, sysconfig, pytest
code = pytest.main(sys.argv[2:])
files = {name: str(module.__file__) for name, module in sys.modules.items() if name.startswith("precision_")}
outside = [file for file in files.values() if not file.startswith(sysconfig.get_path("purelib"))]
if outside or sys.argv[1] not in files:
    sys.exit(f"not the installed package: {outside[:2] or 'never imported'}")
sys.exit(code)
"""


class Environment:
    """A fresh virtual environment. uv works outside of the checkout, so that it sees no settings and no sources."""

    def __init__(self, folder: Path, row: dict[str, Any], wheels: dict[str, Path]) -> None:
        folder.mkdir(parents=True)
        self.folder, self.python = folder, folder / "venv" / "bin" / "python"
        self.variables = {name: text for name, text in os.environ.items() if name not in {"VIRTUAL_ENV", "PYTHONPATH"}}
        # the tests start what the package installs
        self.variables["PATH"] = f"{self.python.parent}{os.pathsep}{os.environ['PATH']}"
        # By path, not --find-links: what is published under the same version must not be taken for what was built here.
        ours = [f"{name} @ {wheel.as_uri()}" for name, wheel in wheels.items()]
        self.constraints = folder / "constraints.txt"
        self.constraints.write_text("\n".join([row["torch"], *row["pins"], *ours]))
        run("uv", "venv", "--python", row["python"], folder / "venv", cwd=folder)

    def _uv(self, *arguments: str | Path, **options: Any) -> str:
        command = ("uv", "pip", *arguments, "--python", self.python)
        return run(*command, cwd=self.folder, env=self.variables, **options)

    def install(self, *requirements: str | Path) -> None:
        self._uv("install", "--no-sources", "--constraints", self.constraints, *requirements)
        self._uv("check")

    def installed(self) -> dict[str, str]:
        listing = json.loads(self._uv("list", "--format", "json"))
        return {distribution(each["name"]): each["version"] for each in listing}

    def resolve(self, requirements: Iterable[str]) -> dict[str, str]:
        """Returns what these would install."""
        options = ("--no-sources", "--no-header", "--no-annotate", "--constraints", self.constraints)
        lines = self._uv("compile", *options, "-", input="\n".join(requirements)).splitlines()
        return {distribution(name): version for name, _, version in (line.partition("==") for line in lines) if version}

    def test(self, package: Package, root: Path) -> str:
        """Runs the package's tests and returns how many there were."""
        report = self.folder / "tests.xml"
        options = ["-q", "-c", f"{root}/pyproject.toml", "-p", "no:cacheprovider", f"--junit-xml={report}"]
        command = [str(self.python), "-c", PYTEST, package.import_name, *options, f"{package.folder}/tests"]
        code = subprocess.run(command, cwd=self.folder, env=self.variables).returncode
        if code:
            raise Problem(f"its tests, against the wheel: exit status {code}")
        (suite,) = ElementTree.parse(report).iter("testsuite")
        skipped = int(suite.attrib["skipped"])
        return f"{int(suite.attrib['tests']) - skipped} passed, {skipped} skipped"


def _must(condition: object, problem: str) -> None:
    if not condition:
        raise Problem(problem)


def check_archives(package: Package, wheel: Path, sdist: Path, licence: bytes) -> None:
    """The licence's text and every file of the package are in both, and the metadata is what publishing tools take."""
    source = package.folder / "src"
    files = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    files = {path for path in files if "__pycache__" not in path}
    with zipfile.ZipFile(wheel) as archive:
        info = f"{package.import_name}-{package.version}.dist-info"
        names = set(archive.namelist())
        packed = {name for name in names if not name.startswith(f"{info}/")}
        _must(packed == files, f"{wheel.name} and {source} differ: {sorted(packed ^ files)}")
        _must(f"{package.import_name}/py.typed" in packed, f"{wheel.name} has no py.typed")
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        _must(metadata["Metadata-Version"] == "2.4", f"{wheel.name}: metadata {metadata['Metadata-Version']}, not 2.4")
        name = f"{info}/licenses/LICENSE"
        _must(name in names and archive.read(name) == licence, f"{wheel.name} does not carry the root's LICENSE")
    with tarfile.open(sdist) as archive:
        top = f"{package.import_name}-{package.version}"
        missing = {f"{top}/src/{name}" for name in files} - set(archive.getnames())
        _must(not missing, f"{sdist.name} lacks {sorted(missing)}")
        text = archive.extractfile(f"{top}/LICENSE") if f"{top}/LICENSE" in archive.getnames() else None
        _must(text and text.read() == licence, f"{sdist.name} does not carry the root's LICENSE")


def _siblings(package: Package, known: dict[str, Package]) -> set[str]:
    """Returns the package and those of ours that it requires, theirs included."""
    direct = {distribution(each) for each in package.requires} & known.keys()
    return {package.name}.union(*(_siblings(known[each], known) for each in direct))


def check_alone(environment: Environment, package: Package, known: dict[str, Package], wheel: Path) -> None:
    """The wheel alone brings what its requirements mean, its siblings as just built, and nothing else."""
    environment.install(wheel)
    ours = _siblings(package, known)
    required = [each for name in ours for each in PROMISED.get(name, known[name].requires)]
    expected = environment.resolve(each for each in required if distribution(each) not in known)
    expected |= {name: known[name].version for name in ours}
    installed = environment.installed()
    extra, missing = (sorted(a.items() - b.items()) for a, b in ((installed, expected), (expected, installed)))
    _must(not extra and not missing, f"its wheel brings what it should not: {extra}; and not what it should: {missing}")
    print(f"{package.name}: alone it brings {', '.join(sorted(installed))}", flush=True)
    place = f"import {package.import_name} as package; print(package.__file__)"
    file = run(environment.python, "-I", "-W", "ignore", "-c", place, cwd=environment.folder).strip()
    _must("site-packages" in Path(file).parts, f"imported from {file}")


def check_extra(environment: Environment, package: Package, extra: str, wheel: Path) -> None:
    environment.install(f"{package.name}[{extra}] @ {wheel.as_uri()}")
    wanted, installed = [distribution(each) for each in package.extras[extra]], environment.installed()
    _must(installed.keys() >= set(wanted), f"{package.name}[{extra}] does not install {wanted}")
    print(f"{package.name}[{extra}]: brings {', '.join(f'{name} {installed[name]}' for name in wanted)}", flush=True)


def check(root: Path, package: Package, known: dict[str, Package], wheels: dict[str, Path]) -> str:
    """Everything about one package; returns how many tests it has."""
    matrix = tomllib.loads((root / "ci" / "matrix.toml").read_text())
    base, wheel = matrix["base"], wheels[package.name]
    rows = {row["package"]: base | row for row in reversed(matrix["row"]) if row.get("hardware", "cpu") == "cpu"}
    row = rows.get(package.name, base)
    sdist = wheel.with_name(f"{package.import_name}-{package.version}.tar.gz")
    check_archives(package, wheel, sdist, (root / "LICENSE").read_bytes())
    with tempfile.TemporaryDirectory() as scratch:
        environment = Environment(Path(scratch, "alone"), row, wheels)
        check_alone(environment, package, known, wheel)
        for extra, requirements in package.extras.items():
            pinned = next((rows[name] for name in map(distribution, requirements) if name in rows), row)
            check_extra(Environment(Path(scratch, extra), pinned, wheels), package, extra, wheel)
        environment.install("--group", f"{package.folder}/pyproject.toml:test", wheel, *row["pins"])
        return environment.test(package, root)


def build(root: Path, package: Package, out: Path) -> Path:
    """Builds the sdist, the wheel from it, and returns the wheel."""
    run("uv", "build", "--package", package.name, "--no-sources", "--out-dir", out, cwd=root)
    (wheel,) = out.glob(f"{package.import_name}-*.whl")
    return wheel


def main() -> None:
    parser = argparse.ArgumentParser(prog="nox -s dist --", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("package", nargs="*", help="default: all")
    names = parser.parse_args().package
    table, failed = [("package", "wheel", "size", "tests", "seconds")], False
    try:
        root = repository()
        known = packages(root)
        chosen = named(known, names or known)
        with tempfile.TemporaryDirectory() as scratch:
            # all of them: a chosen one may require any
            wheels = {name: build(root, package, Path(scratch)) for name, package in known.items()}
            for package in chosen:
                started = time.monotonic()
                try:
                    result = check(root, package, known, wheels)
                except Problem as problem:
                    print(f"{package.name}: {problem}", flush=True)
                    result, failed = "FAILED, see above", True
                wheel, seconds = wheels[package.name], time.monotonic() - started
                table.append((package.name, wheel.name, f"{wheel.stat().st_size >> 10} KiB", result, f"{seconds:.0f}"))
    except Problem as problem:
        sys.exit(f"dist: {problem}")
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print("", *("  ".join(map(str.ljust, line, widths)).rstrip() for line in table), sep="\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
