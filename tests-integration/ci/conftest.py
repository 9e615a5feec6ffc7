"""A git repository of a test's own, on which the scripts of ci/ run as commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "ci"
AUTHOR = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main")
# Neither this machine's settings and hooks, nor the repository around a hook that runs the tests.
VARIABLES = {name: text for name, text in os.environ.items() if not name.startswith("GIT_")}
VARIABLES |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}


class Repository:
    def __init__(self, root: Path) -> None:
        self.root = root

    def _run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=self.root, env=VARIABLES, capture_output=True, text=True)

    def git(self, *arguments: str) -> str:
        done = self._run("git", *AUTHOR, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def write(self, *paths: str, text: str = "changed\n") -> None:
        for path in paths:
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            (self.root / path).write_text(text)

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "change")

    def below(self, folder: str) -> Repository:
        return Repository(self.root / folder)

    def copied(self, root: Path) -> Repository:
        """Returns a copy of all of it, which takes a tenth of making it anew."""
        shutil.copytree(self.root, root, symlinks=True)
        return Repository(root)

    def script(self, name: str, *arguments: str) -> str:
        done = self._run(sys.executable, SCRIPTS / name, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def error(self, name: str, *arguments: str) -> str:
        """Returns what a script says that must fail. It prints nothing else, and no traceback."""
        done = self._run(sys.executable, SCRIPTS / name, *arguments)
        assert (done.returncode, done.stdout, done.stderr.count("Traceback")) == (1, "", 0)
        return done.stderr


@pytest.fixture(scope="session")
def make_empty() -> Callable[[Path], Repository]:
    def make_empty(folder: Path) -> Repository:
        repository = Repository(folder / "repository")
        repository.root.mkdir()
        repository.git("init", "--quiet")
        return repository

    return make_empty


@pytest.fixture
def empty(make_empty: Callable[[Path], Repository], tmp_path: Path) -> Repository:
    return make_empty(tmp_path)
