"""The library: imported when it is first needed, or an error that says what to install."""

from __future__ import annotations

import importlib
import re
import warnings
from types import ModuleType

VERSION = (2, 20)
"""The release that `precision_te.vendor` is written for: its layers derive from the library's, private parts too."""

RANGE = f">={VERSION[0]}.{VERSION[1]},<{VERSION[0]}.{VERSION[1] + 1}"
"""What `pip` is told of it; the extra `vendor` says the same."""
INSTALL = (
    "install torch first, with CUDA, then `pip install --no-build-isolation "
    f'"transformer-engine[core_cu13,pytorch]{RANGE}"` (core_cu12 for a torch with CUDA 12)'
)
INSTALL_RECIPES = (
    f'{INSTALL}; the recipes alone need no GPU and no compiler: `pip install "./packages/precision-te[vendor]"` in a '
    "checkout, and NVTE_PROJECT_BUILDING=1 in the environment that Python is started in"
)
ELSEWHERE = (
    'on this machine precision="fp8-reference", the other modes that end in -reference, and engine="reference" compute '
    "the same recipes in plain torch, slowly [no-fp8-here]"
)
"""The way out where the library or the GPU is missing; last in a message, since it ends in the code."""


_loaded: list[ModuleType] = []  # a list, and not functools.cache: torch.compile warns of calls to what that wraps


def load() -> ModuleType:
    """Returns `transformer_engine.pytorch`, built from source or from wheels; imports it once.

    Raises:
        ImportError: it is missing, without its torch extension, of another release, or raises when it is imported;
            says what to install.
    """
    if not _loaded:
        module = _imported("transformer_engine.pytorch", "engine='te'", f"{INSTALL}; {ELSEWHERE}")
        check_version(importlib.import_module("transformer_engine").__version__)
        _loaded.append(module)
    return _loaded[0]


def load_recipes() -> ModuleType:
    """Returns `transformer_engine.common.recipe`, which is real without a GPU; raises `ImportError` likewise."""
    return _imported("transformer_engine.common.recipe", "setup_fp8_recipe()", INSTALL_RECIPES)


def check_version(found: str) -> None:
    """Raises `ImportError` for a release other than `VERSION`; a build from source has more: "2.20.0+1a2b"."""
    numbers = re.match(r"(\d+)\.(\d+)(?!\d)", found)
    if numbers is None or tuple(map(int, numbers.groups())) != VERSION:
        written_for = ".".join(map(str, VERSION))
        raise ImportError(
            f"engine='te': Transformer Engine {found} is installed, and this precision-te is written for "
            f"{written_for}: {INSTALL}; {ELSEWHERE}"
        )


def _imported(name: str, caller: str, install: str) -> ModuleType:
    try:
        with warnings.catch_warnings():  # that its extension is missing, which is no error for its recipes
            warnings.filterwarnings("ignore", "Detected a PyTorch installation", RuntimeWarning)
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "transformer_engine":
            raise ImportError(f"{caller} needs Transformer Engine, which is not installed: {install}") from error
        raise ImportError(f"{caller}: Transformer Engine lacks {error.name}: {install}") from error
    except Exception as error:  # its own checks, and the loader of its shared objects, raise anything
        raise ImportError(
            f"{caller}: Transformer Engine cannot be imported here, {type(error).__name__}: {error}; {install}"
        ) from error
