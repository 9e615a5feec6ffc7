"""The library: imported when it is first needed, or an error that says what to install."""

from __future__ import annotations

import importlib
import warnings
from importlib.metadata import distributions
from importlib.util import find_spec
from types import ModuleType

INSTALL = (
    "install torch first, with CUDA, then `pip install --no-build-isolation "
    '"transformer-engine[core_cu13,pytorch]>=2.20,<2.21"` (core_cu12 for a torch with CUDA 12)'
)
INSTALL_RECIPES = (
    f'{INSTALL}; the recipes alone need no GPU and no compiler: `pip install "./packages/precision-te[vendor]"` in a '
    "checkout, and NVTE_PROJECT_BUILDING=1 in the environment that Python is started in"
)


def has_kernels() -> bool:
    """Whether the library's torch extension is installed, beside the recipes."""
    return any(distributions(name="transformer-engine-torch"))  # its module is in no folder that Python looks into


def load() -> ModuleType:
    """Returns `transformer_engine.pytorch`; raises `ImportError` with what to install."""
    if find_spec("transformer_engine") is not None and not has_kernels():
        raise ImportError(
            "engine='te' needs Transformer Engine's torch extension, transformer-engine-torch, which is not installed "
            f"beside its recipes: {INSTALL}"
        )
    return _imported("transformer_engine.pytorch", "engine='te'", INSTALL)


def load_recipes() -> ModuleType:
    """Returns `transformer_engine.common.recipe`, which is real without a GPU; raises `ImportError` likewise."""
    with warnings.catch_warnings():  # that the rest of the library is missing, which is no error here
        warnings.filterwarnings("ignore", "Detected a PyTorch installation", RuntimeWarning)
        return _imported("transformer_engine.common.recipe", "setup_fp8_recipe()", INSTALL_RECIPES)


def _imported(name: str, caller: str, install: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "transformer_engine":
            raise ImportError(f"{caller} needs Transformer Engine, which is not installed: {install}") from error
        raise ImportError(f"{caller}: Transformer Engine lacks {error.name}: {install}") from error
    except Exception as error:  # its own checks, and the loader of its shared objects, raise anything
        raise ImportError(
            f"{caller}: Transformer Engine cannot be imported here, {type(error).__name__}: {error}; {install}"
        ) from error
