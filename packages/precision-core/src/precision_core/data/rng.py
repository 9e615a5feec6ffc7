"""Random number generators: seeds them, and saves and restores their states as plain values and tensors."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

from precision_core.hardware import MODULES, module_of


def seed_everything(seed: int) -> int:
    """Seeds Python's, numpy's (where it is installed) and torch's generators, all devices included; returns `seed`.

    Raises:
        ValueError: not an int from 0 to 2**32 - 1, numpy's range.
    """
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise ValueError(f"seed_everything({seed!r}): expected an int from 0 to {2**32 - 1}")
    random.seed(seed)
    numpy = _numpy()
    if numpy is not None:
        numpy.random.seed(seed)
    torch.manual_seed(seed)
    for module in MODULES.values():
        module.manual_seed_all(seed)
    return seed


def rng_state(device: torch.device) -> dict[str, Any]:
    """Returns the states of Python's, numpy's, torch's and `device`'s generators."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    numpy = _numpy()
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        state["numpy"] = [name, torch.from_numpy(keys.astype("int64")), *rest]
    if device.type != "cpu":
        state[device.type] = module_of(device.type).get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Restores what `rng_state` returned; generators that are not in it, or not here, keep their state."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    numpy = _numpy()
    if numpy is not None and "numpy" in state:
        name, keys, *rest = state["numpy"]
        numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    if device.type in state:
        module_of(device.type).set_rng_state(state[device.type], device)


def _numpy() -> Any:
    return sys.modules.get("numpy")  # torch imports it where it is installed
