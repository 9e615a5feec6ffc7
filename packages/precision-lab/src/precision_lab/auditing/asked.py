"""Which precision the script asked its library for: read from the library's own object."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import FrameType
from typing import Any

import torch

from precision_lab.auditing.record import Asked
from precision_lab.auditing.where import LIBRARIES, Where

Host = tuple[Any, Callable[[Any], Asked]]

_ACCELERATE = {"fp16": torch.float16, "bf16": torch.bfloat16}
_LIGHTNING = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32, "64": torch.float64}


def _of_accelerate(accelerator: Any) -> Asked:
    mode = str(accelerator.mixed_precision)
    return Asked("Accelerate", f'Accelerator(mixed_precision="{mode}")', _ACCELERATE.get(mode), mode.endswith("-true"))


def _of_transformers(trainer: Any) -> Asked:
    arguments = trainer.args
    mode = next((name for name in _ACCELERATE if getattr(arguments, name, False)), "")
    text = f"{type(arguments).__name__}({mode}{'=True' if mode else ''})"
    return Asked("transformers", text, _ACCELERATE.get(mode), False)


def _of_lightning(name: str, plugin: str) -> Callable[[Any], Asked]:
    def read(host: Any) -> Asked:
        mode = str(getattr(getattr(host, plugin), "precision", ""))
        dtype = _LIGHTNING.get(mode.partition("-")[0]) if mode != "32-true" else None  # which is its default
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
    ("transformers.trainer", "Trainer", _of_transformers),
    ("precision_core.fabric", "Fabric", _of_ours),
)
"""Module, class, and how to read what it was asked for. Lightning has no public name for its Fabric's."""


_ARGUMENTS = {
    "Accelerate": ("mixed_precision", "fp16=", "bf16="),
    "transformers": ("fp16=", "bf16=", "TrainingArguments(", "Config("),
    "Lightning": ("precision=",),
    "precision": ("precision=",),
}
"""How scripts spell what they ask for."""


def read_calling(where: Where) -> list[Asked]:
    """Returns what the hosts of known libraries were asked for whose backward calls this."""
    return _read(where, list(_calling(_classes())))


def read_alive(where: Where, libraries: set[str]) -> list[Asked]:
    """Returns the same of the libraries' only hosts that are alive, as when a script calls `loss.backward()` itself."""
    return _read(where, list(_alive(_classes(libraries))))


def _classes(libraries: set[str] | None = None) -> dict[type, Callable[[Any], Asked]]:
    """Returns the hosts' classes that are loaded, of these libraries or of all."""
    found: dict[type, Callable[[Any], Asked]] = {}
    for module, name, read in _HOSTS:
        kind = getattr(sys.modules.get(module), name, None)
        if isinstance(kind, type) and (libraries is None or LIBRARIES.get(module.partition(".")[0]) in libraries):
            found[kind] = read
    return found


def _read(where: Where, hosts: list[Host]) -> list[Asked]:
    found: list[Asked] = []
    for host, read in hosts:
        try:
            asked = read(host)
        except AttributeError:  # half made
            continue
        texts = (*_ARGUMENTS.get(asked.library, ()), f"{type(host).__name__}(")
        line = next(filter(None, map(where.line_with, texts)), None)
        if (asked := replace(asked, line=line)) not in found:
            found.append(asked)
    # transformers' Trainer makes an Accelerator of its own, by its arguments.
    theirs = any(each.library == "transformers" for each in found)
    return [each for each in found if not (theirs and each.library == "Accelerate")]


def _reader(host: Any, classes: dict[type, Callable[[Any], Asked]]) -> Callable[[Any], Asked] | None:
    return next((classes[base] for base in type.mro(type(host)) if base in classes), None)


def _calling(classes: dict[type, Callable[[Any], Asked]]) -> Iterator[Host]:
    frame: FrameType | None = sys._getframe(1) if classes else None
    while frame is not None:
        host = frame.f_locals.get("self") if "self" in frame.f_code.co_varnames else None
        if host is not None and (read := _reader(host, classes)) is not None:
            yield host, read
        frame = frame.f_back


def _alive(classes: dict[type, Callable[[Any], Asked]]) -> Iterator[Host]:
    if not _instances(classes):
        return
    gc.collect()  # hosts are in cycles: those of an earlier run live on
    hosts = [(host, _reader(host, classes)) for host in _instances(classes)]
    found: list[Host] = [(host, read) for host, read in hosts if read is not None]
    for read in {read for _, read in found}:
        same = [host for host in found if host[1] is read]
        yield from same if len(same) == 1 else []


def _instances(classes: dict[type, Callable[[Any], Asked]]) -> list[Any]:
    """Returns the objects of these classes: they refer to their class, which the collector looks up much faster."""
    every, waiting = set[type](), list(classes)
    while waiting:
        each = waiting.pop()
        if each not in every:
            every.add(each)
            waiting += type.__subclasses__(each)
    found = gc.get_referrers(*every) if every else []
    return [each for each in found if type(each) in every]
