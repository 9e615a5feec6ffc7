"""Words that several rules use: names listed, sizes, shares, and what half parameters there are."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable

import torch

from precision_lab.auditing.record import FORWARD, Event, Record
from precision_lab.auditing.where import Line

HALVES = (torch.bfloat16, torch.float16)


def listed(names: Iterable[str], limit: int = 3) -> str:
    """Returns the first names, and how many more there are."""
    every = list(dict.fromkeys(names))
    more = len(every) - limit
    return ", ".join(every[:limit]) + (f" and {more} more" if more > 0 else "")


def dtypes(values: Iterable[torch.dtype]) -> str:
    """Returns the dtypes' names, without "torch."."""
    return " and ".join(sorted({str(each).removeprefix("torch.") for each in values}))


def size(count: float) -> str:
    """Returns a number of bytes for a reader."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"


def module_of(names: Collection[str]) -> str:
    """Returns the innermost module that has all these parameters, empty for the whole model."""
    parts = [name.split(".")[:-1] for name in names]
    same = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))
    return ".".join(level[0] for level in same)


def is_asked(record: Record) -> bool:
    """Whether the parameters are half because an engine's own named mode was chosen.

    transformers' documentation has models loaded in half and trained by a Trainer with bf16=True, under autocast.
    """
    by_trainer = any(event.library in ("transformers", "TRL") for event in record.of("step"))
    mixed = any(op.autocast for op in record.ops if op.phase == FORWARD)
    half = any(each.kind in ("params", "frozen") and each.dtype in HALVES for each in record.stored)
    return bool(record.engines) or (by_trainer and mixed and half)


def cast_line(record: Record, to: Iterable[torch.dtype] = HALVES) -> Line | None:
    """Returns where a model was cast to one of the dtypes, or made in it, else where the first step was made."""
    wanted = set(to)
    casts: list[Event] = [event for event in record.of("module_cast") if event.to in wanted]
    made: list[Event] = [event for event in record.of("made_half") if event.dtype in wanted]
    if (line := _storage_line(record, wanted)) is not None:
        return line
    default = [event for event in record.of("default_dtype") if event.dtype in wanted] if made else []
    found = casts[-1:] or default or made or record.of("step")
    return found[0].line if found else None


def _storage_line(record: Record, wanted: set[torch.dtype]) -> Line | None:
    """Returns where parameters were cast one by one, as `param.data = param.data.half()` does: of most of them."""
    halves = [each.name for each in record.stored if each.kind == "params" and each.dtype in wanted]
    lines = Counter(record.cast_lines[name] for name in halves if name in record.cast_lines)
    return lines.most_common(1)[0][0] if lines else None
