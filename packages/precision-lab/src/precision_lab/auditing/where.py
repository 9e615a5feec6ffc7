"""Which line of the user's own code a call comes from, and through which library it came."""

from __future__ import annotations

import linecache
import os
import re
import site
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType

from torch import nn

import precision_core

LIBRARIES = {
    "lightning": "Lightning",
    "lightning_fabric": "Lightning",
    "pytorch_lightning": "Lightning",
    "accelerate": "Accelerate",
    "transformers": "transformers",
    "trl": "TRL",
    "deepspeed": "DeepSpeed",
    "precision_core": "precision",
    "precision_fsdp": "precision",
    "precision_deepspeed": "precision",
    "precision_bnb": "precision",
    "precision_te": "precision",
    "precision_xla": "precision",
}
"""Packages that run a loop, or a part of one, for the user -> what we call them."""

_BETWEEN = ("torch", "precision_lab", "contextlib", "functools", "typing", "runpy", "__main__")
"""Packages between an operation and who called it."""


def _installed_folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    found = {paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    found.update(site.getsitepackages() if hasattr(site, "getsitepackages") else ())
    found.add(site.getusersitepackages())
    ours = Path(__file__).resolve().parents[1]
    found.update((str(ours), str(Path(precision_core.__file__).parent)))
    for name in LIBRARIES:  # checkouts of libraries, ours among them, that are installed in place
        if (module := sys.modules.get(name)) is not None and getattr(module, "__file__", None):
            found.add(str(Path(str(module.__file__)).parent))
    return tuple(sorted({os.path.join(os.path.abspath(folder), "") for folder in found}))


@dataclass(frozen=True)
class Line:
    """A line of the user's code."""

    file: str
    number: int
    function: str

    @property
    def text(self) -> str:
        """The source of the line, without spaces around it; empty where there is no file."""
        return linecache.getline(self.file, self.number).strip()

    def __str__(self) -> str:
        file = self.file
        if not file.startswith("<"):
            try:
                near = os.path.relpath(file)
                file = near if not near.startswith("..") else file
            except ValueError:  # another drive
                pass
        return f"{file}:{self.number}"


class Where:
    """Finds the user's line above the caller, by what each code object was found to be before."""

    def __init__(self) -> None:
        self._folders = _installed_folders()
        self._is_own: dict[CodeType, bool] = {}
        self._lines: dict[tuple[CodeType, int], Line] = {}

    def line(self, depth: int = 1) -> Line | None:
        """Returns the innermost line outside of the standard library and of installed packages; None: there is none."""
        frame: FrameType | None = sys._getframe(depth)
        while frame is not None:
            code = frame.f_code
            own = self._is_own.get(code)
            if own is None:
                own = self._is_own[code] = self._decide(code)
            if own:
                key = code, frame.f_lineno
                if key not in self._lines:
                    self._lines[key] = Line(code.co_filename, frame.f_lineno, code.co_name)
                return self._lines[key]
            frame = frame.f_back
        return None

    def line_with(self, text: str) -> Line | None:
        """Returns the first line with `text` in the user's files that have run so far."""
        for file in {code.co_filename: None for code, own in self._is_own.items() if own}:
            for number, line in enumerate(linecache.getlines(file), start=1):
                if text in line and not line.lstrip().startswith(("#", "import ", "from ", "def ")):
                    return Line(file, number, "")
        return None

    def rate_line(self) -> Line | None:
        """Returns the first line of the user's files that sets a learning rate, with the function that it is in."""
        for file in {code.co_filename: None for code, own in self._is_own.items() if own}:
            function = ""
            for number, line in enumerate(linecache.getlines(file), start=1):
                if found := re.match(r"\s*def (\w+)", line):
                    function = found[1]
                if re.search(r"""\[["']lr["']\]\s*[-+*/]?=[^=]""", line):
                    return Line(file, number, function)
        return None

    def library(self, depth: int = 1) -> str:
        """Returns which of `LIBRARIES` made the call, the outermost above the user's line; else an empty text.

        TRL's trainers are those of transformers, so that TRL's own code is in between.
        """
        frame: FrameType | None = sys._getframe(depth)
        found = ""
        while frame is not None and not self._is_own.get(frame.f_code, False):
            package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
            found = found if found == "TRL" else LIBRARIES.get(package, found)
            frame = frame.f_back
        return found

    def package(self, depth: int = 1) -> str:
        """Returns the installed package, other than torch, that made the call; empty for the user's own code."""
        frame: FrameType | None = sys._getframe(depth)
        while frame is not None:
            code = frame.f_code
            if code not in self._is_own:
                self._is_own[code] = self._decide(code)
            package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
            if self._is_own[code] or package not in _BETWEEN:
                return "" if self._is_own[code] else package
            frame = frame.f_back
        return ""

    def owner(self, module: nn.Module, depth: int = 1, limit: int = 60) -> nn.Module:
        """Returns the outermost module with a method that runs and has `module` in it, as a `training_step` has; else
        the module itself."""
        frame: FrameType | None = sys._getframe(depth)
        found, seen = module, set[int]()
        for _ in range(limit):
            if frame is None:
                break
            held = frame.f_locals.get("self") if "self" in frame.f_code.co_varnames else None
            if isinstance(held, nn.Module) and id(held) not in seen:
                seen.add(id(held))
                found = held if any(each is found for each in held.modules()) else found
            frame = frame.f_back
        return found

    def functions(self, depth: int = 1, limit: int = 40) -> list[str]:
        """Returns the names of the functions from the caller up to the user's line, innermost first."""
        frame: FrameType | None = sys._getframe(depth)
        found: list[str] = []
        while frame is not None and len(found) < limit:
            found.append(frame.f_code.co_name)
            if self._is_own.get(frame.f_code, False):
                break
            frame = frame.f_back
        return found

    def value_in(self, function: str, names: tuple[str, ...], limit: int = 12) -> float | None:
        """Returns a number that the nearest caller whose name begins so has as one of its variables."""
        frame: FrameType | None = sys._getframe(1)
        for _ in range(limit):
            if frame is None:
                break
            if frame.f_code.co_name.startswith(function):
                values = [frame.f_locals.get(name) for name in names]
                return next((float(value) for value in values if isinstance(value, (int, float))), None)
            frame = frame.f_back
        return None

    def _decide(self, code: CodeType) -> bool:
        file = code.co_filename
        if file.startswith("<") and not file.startswith(("<ipython", "<stdin")):
            return False  # frozen importlib, generated code
        return not os.path.abspath(file).startswith(self._folders)
