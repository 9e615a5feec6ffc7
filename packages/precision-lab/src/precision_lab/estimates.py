"""`precision estimate`: the memory of each mode before anything is allocated, and whether it fits."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from precision_core import MODES
from precision_core.support import is_core_mode, resolve_strategy
from precision_lab.footprint import KINDS, TRACED, Footprint, trace
from precision_lab.formulas import FORMULAS, accelerate_says, sharded
from precision_lab.hf import hf_maker
from precision_lab.modes import modes_to_run, parse_modes
from precision_lab.shown import Shown
from precision_lab.table import human_bytes
from precision_lab.task import Task
from precision_lab.taskfile import TaskError, guarded, load_make
from precision_lab.train import SIZES, gpt_maker
from precision_lab.variants import split_variants, varied


@dataclass(repr=False)
class Estimates(Shown):
    """A footprint for each mode, bytes of one process; and what there is room for, by choice."""

    rows: list[Footprint]
    fit: int | None = None
    asked: str = ""
    """`fit` as it was written, and in the table's units."""

    def table(self) -> tuple[list[str], list[list[str]], list[str]]:
        """Returns the columns, a row for each mode that could be estimated, and the verdict."""
        done = [row for row in self.rows if not row.reason]
        cells = [[row.mode, *(human_bytes(row.of(kind)) for kind in (*KINDS, "peak")), row.how] for row in done]
        why = [f"{row.mode}: no estimate: {row.reason}" for row in self.rows if row.reason]
        return ["mode", *KINDS, "peak", "how"], cells, [*self.verdict(), *self.beside(), *why]

    def beside(self) -> list[str]:
        """Returns in sentences what was done with values all the same, and what Accelerate's formula says."""
        done = [row for row in self.rows if not row.reason]
        loaded = max((row.loaded for row in done), default=0)
        lines = [f"make() had the model's values in memory for that, {human_bytes(loaded)}"] * bool(loaded)
        twice = [f"{row.mode} {human_bytes(row.set_up)}" for row in done if row.set_up > row.peak]
        if twice:
            lines.append(f"set-up takes more than a step, where make() puts the model: {', '.join(twice)}")
        says = {row.mode: accelerate_says(row.numbers, row.mode) for row in done}
        sizes: dict[int, list[str]] = {}
        for mode, size in says.items():
            if size is not None:
                sizes.setdefault(size, []).append(mode)
        listed = "; ".join(f"{human_bytes(size)} for {', '.join(modes)}" for size, modes in sizes.items())
        return [*lines, *([f"accelerate estimate-memory, without activations, says {listed}"] * bool(listed))]

    def verdict(self) -> list[str]:
        """Returns in sentences which modes fit."""
        done = sorted((row for row in self.rows if not row.reason), key=lambda row: row.peak)
        if self.fit is None or not done:
            return []
        room = self.asked or human_bytes(self.fit)
        if done[0].devices > 1:
            room += f" on each of {done[0].devices} devices"
        inside = [row for row in done if row.peak <= self.fit]
        outside = [
            f"{row.mode} does not fit in {room}: it needs {_needs(row.peak, self.fit)}" for row in done[len(inside) :]
        ]
        if inside:
            names = [row.mode for row in inside]
            listed = " and ".join([*([", ".join(names[:-1])] * (len(names) > 1)), names[-1]])
            return [*outside, f"{listed} {'fits' if len(names) == 1 else 'fit'} in {room}"]
        more = "" if len(done) >= len(MODES) else "; leave modes out to see all of core's"
        return [*outside, f"none of these modes fits{more}" if len(done) > 1 else f"no other mode was tried{more}"]

    def as_dict(self) -> dict[str, Any]:
        """Returns everything as plain values for JSON."""
        modes = [{**asdict(row), "accelerate": accelerate_says(row.numbers, row.mode)} for row in self.rows]
        return {"version": 1, "fit": self.fit, "verdict": self.verdict(), "modes": modes}


def estimate(
    task: str | PathLike[str] | Callable[[], Any] | None = None,
    modes: str | Sequence[str] | None = None,
    *,
    strategy: str = "single_device",
    devices: int = 1,
    fit: str | int | None = None,
    hf: str | PathLike[str] | None = None,
    batch: str = "1x2048",
    size: str = "1m",
) -> Estimates:
    """Returns the bytes of a training step in each mode, by kind, without allocating them.

    Args:
        task: as for `compare`; its code runs with tensors that have no values.
        modes: as for `compare`, variants included.
        strategy: "single_device", "ddp" or "fsdp" (which needs precision-fsdp), which are traced; "deepspeed" (stage 2)
            or "xla", by a formula on what was traced on one device.
        devices: how many of them; each gets batches like those of the task.
        fit: what there is room for, "24GB" or bytes.
        hf: a Hugging Face config.json, or its folder: that causal language model with AdamW, in place of a task.
        batch: of `hf`, sequences x tokens.
        size: of the built-in GPT, where there is neither.

    Raises:
        ValueError: an unknown mode, strategy, size, batch or amount of memory, a package that is not installed, or no
            such file.
        TaskError: the user's code raised.
    """
    _check_strategy(strategy, devices)
    room = None if fit is None else parse_bytes(fit)
    named = modes not in (None, "all")
    text = modes if modes is None or isinstance(modes, str) else ",".join(modes)
    listed = parse_modes(str(text), variants=True) if named else modes_to_run(None if text is None else str(text))
    make = _maker(task, hf, batch, size)
    rows = [sharded(_traced(mode, make, strategy, devices), strategy, devices) for mode in listed]
    return Estimates(rows, room, "" if room is None else _written(fit, room))


def _written(fit: str | int | None, room: int) -> str:
    """Returns "24 GB (22.4 GiB)" for "24GB"."""
    own = re.sub(r"(?<=\d)\s*(?=[A-Za-z])", " ", str(fit).strip())
    if not own[-1].isalpha():
        own += " bytes"
    table = human_bytes(room)
    return table if own.lower() == table.lower() else f"{own} ({table})"


def _needs(peak: int, room: int) -> str:
    text = human_bytes(peak)
    return text if text != human_bytes(room) else f"{text}, which is {peak - room:,} bytes more"


def _check_strategy(strategy: str, devices: int) -> None:
    several = [*(name for name in TRACED if name != "single_device"), *FORMULAS]
    if strategy not in several and strategy != "single_device":
        raise ValueError(f"strategy {strategy!r} cannot be estimated: single_device and {', '.join(several)} can")
    if strategy in several and devices < 2:
        raise ValueError(f"strategy {strategy!r} is for several devices: say how many, 2 or more, by devices")
    if strategy not in several and devices != 1:
        raise ValueError(f"devices={devices} needs a strategy that says how they share the work: {', '.join(several)}")
    if strategy == "fsdp":
        resolve_strategy(strategy, "cpu", 1, 1)  # says what to install


def _maker(task: Any, hf: Any, batch: str, size: str) -> Callable[[], Task]:
    if hf is not None:
        if task is not None:
            raise ValueError("a task and hf are two models: give one of them")
        return hf_maker(Path(hf), batch)
    if task is None:
        if size not in SIZES:
            raise ValueError(f"size {size!r}: expected one of {', '.join(SIZES)}")
        return gpt_maker(torch.device("cpu"), size)
    return guarded(task) if callable(task) else load_make(str(task))


def _traced(mode: str, make: Callable[[], Task], strategy: str = "single_device", devices: int = 1) -> Footprint:
    try:
        if strategy in FORMULAS:
            strategy, devices = "single_device", 1
        precision, changes = split_variants(mode) if "+" in mode else (mode, ())
        found = trace(precision, varied(make, changes), strategy=strategy, devices=devices)
        return replace(found, mode=mode)
    except TaskError:
        raise
    except Exception as error:  # a mode that cannot run here, a kernel that needs values: the others go on
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if not is_core_mode(mode):
            reason += (
                f" ({mode} may need the values that a trace has not: precision compare --modes {mode} measures it)"
            )
        return Footprint(mode, reason=reason)


def traced(mode: str, make: Callable[[], Task]) -> Footprint:
    """Returns the footprint of a task that was made before, with values: what raises without them is the reason."""
    try:
        return _traced(mode, make)
    except TaskError as error:
        return Footprint(mode, reason=str(error).splitlines()[-1])


def parse_bytes(amount: str | int) -> int:
    """Returns bytes of "24GB" (powers of 1000), "24GiB" (of 1024), or a number.

    Raises:
        ValueError: it is none of these, or a text of a small number without a unit.
    """
    found = re.fullmatch(r"([\d.]+)\s*([KMGT]?)(i?)B?", str(amount).strip(), re.IGNORECASE)
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:
        number = 0.0
    if found is None or number <= 0:
        raise ValueError(f"{amount!r} is no amount of memory: expected 24GB or 24GiB")
    if isinstance(amount, str) and amount.strip()[-1:].isdigit() and number < 2**20:
        raise ValueError(
            f"{amount!r} would be {amount.strip()} bytes: say {amount.strip()}GB, {amount.strip()}GiB or bytes with B"
        )
    return round(number * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " "))
