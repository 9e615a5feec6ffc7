"""Which precision the script asked its library for: read from the library's own object."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from precision_lab.auditing.record import Asked
from precision_lab.auditing.where import Where

_ACCELERATE = {"fp16": torch.float16, "bf16": torch.bfloat16}
_LIGHTNING = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32, "64": torch.float64}


def _of_accelerate(accelerator: Any) -> Asked:
    mode = str(accelerator.mixed_precision)
    return Asked("Accelerate", f'Accelerator(mixed_precision="{mode}")', _ACCELERATE.get(mode), mode.endswith("-true"))


def _of_lightning(name: str, plugin: str) -> Callable[[Any], Asked]:
    def read(host: Any) -> Asked:
        mode = str(getattr(getattr(host, plugin), "precision", ""))
        dtype = _LIGHTNING.get(mode.partition("-")[0])
        return Asked("Lightning", f'{name}(precision="{mode}")', dtype, mode.endswith("-true"))

    return read


def _of_ours(fabric: Any) -> Asked:
    policy = fabric.precision_plugin.policy
    return Asked("precision", f'Fabric(precision="{policy.flat}")', policy.compute, not policy.mixed)


_HOSTS: tuple[tuple[str, str, Callable[[Any], Asked]], ...] = (
    ("accelerate.accelerator", "Accelerator", _of_accelerate),
    ("lightning_fabric.fabric", "Fabric", _of_lightning("Fabric", "_precision")),
    ("lightning.fabric.fabric", "Fabric", _of_lightning("Fabric", "_precision")),
    ("lightning.pytorch.trainer.trainer", "Trainer", _of_lightning("Trainer", "precision_plugin")),
    ("pytorch_lightning.trainer.trainer", "Trainer", _of_lightning("Trainer", "precision_plugin")),
    ("precision_core.fabric", "Fabric", _of_ours),
)
"""Module, class, and how to read what it was asked for. Lightning has no public name for its Fabric's."""


_ARGUMENTS = {
    "Accelerate": ("mixed_precision", "fp16=", "bf16="),
    "Lightning": ("precision=",),
    "precision": ("precision=",),
}
"""How scripts spell what they ask for."""


def read_asked(where: Where) -> list[Asked]:
    """Returns what every host of a known library that is alive was asked for."""
    classes: dict[type, Callable[[Any], Asked]] = {}
    known: dict[type, Callable[[Any], Asked] | None] = {}
    for module, name, read in _HOSTS:
        kind = getattr(sys.modules.get(module), name, None)
        if isinstance(kind, type):
            classes[kind] = read
    found: list[Asked] = []
    for each in gc.get_objects() if classes else ():
        kind = type(each)
        if kind not in known:
            known[kind] = next((classes[base] for base in type.mro(kind) if base in classes), None)
        if (read := known[kind]) is None:
            continue
        try:
            asked = read(each)
        except AttributeError:  # half made
            continue
        texts = (*_ARGUMENTS.get(asked.library, ()), f"{kind.__name__}(")
        line = next(filter(None, map(where.line_with, texts)), None)
        if (asked := replace(asked, line=line)) not in found:
            found.append(asked)
    return found
