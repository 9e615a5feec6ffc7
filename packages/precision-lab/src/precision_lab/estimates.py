"""`precision estimate`: the memory of each mode before anything is allocated, and whether it fits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from precision_core.support import resolve_strategy
from precision_lab.footprint import KINDS, TRACED, Footprint, trace
from precision_lab.formulas import FORMULAS, accelerate_says, sharded
from precision_lab.modes import modes_to_run, parse_modes
from precision_lab.shown import Shown
from precision_lab.table import human_bytes
from precision_lab.task import Task
from precision_lab.taskfile import TaskError, guarded, load_make
from precision_lab.train import SIZES, gpt_maker


@dataclass(repr=False)
class Estimates(Shown):
    """A footprint for each mode, bytes of one process; and what there is room for, by choice."""

    rows: list[Footprint]
    fit: int | None = None
    lines: list[str] = field(default_factory=list)

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
        says = {row.mode: accelerate_says(row.numbers, row.mode) for row in done}
        sizes: dict[int, list[str]] = {}
        for mode, size in says.items():
            if size is not None:
                sizes.setdefault(size, []).append(mode)
        listed = "; ".join(f"{human_bytes(size)} for {', '.join(modes)}" for size, modes in sizes.items())
        return [*lines, *([f"accelerate estimate-memory, without activations, says {listed}"] * bool(listed))]

    def verdict(self) -> list[str]:
        """Returns in sentences which modes fit."""
        if self.fit is None:
            return []
        done = sorted((row for row in self.rows if not row.reason), key=lambda row: row.peak)
        room, inside = human_bytes(self.fit), [row for row in done if row.peak <= self.fit]
        outside = [
            f"{row.mode} does not fit in {room}: it needs {human_bytes(row.peak)}" for row in done[len(inside) :]
        ]
        fits = f"{', '.join(row.mode for row in inside)} fit{'s' * (len(inside) == 1)} in {room}"
        return [*outside, fits if inside else f"no mode fits in {room}"]

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
        modes: as for `compare`.
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
    listed = parse_modes(str(text)) if named else modes_to_run(None if text is None else str(text))
    make = _maker(task, hf, batch, size)
    rows = [sharded(_traced(mode, make, strategy, devices), strategy, devices) for mode in listed]
    return Estimates(rows, room)


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
        return trace(mode, make, strategy=strategy, devices=devices)
    except TaskError:
        raise
    except Exception as error:  # a mode that cannot run here, a kernel that needs values: the others go on
        return Footprint(mode, reason=f"{type(error).__name__}: {error}".splitlines()[0])


def traced(mode: str, make: Callable[[], Task]) -> Footprint:
    """Returns the footprint of a task that was made before, with values: what raises without them is the reason."""
    try:
        return _traced(mode, make)
    except TaskError as error:
        return Footprint(mode, reason=str(error).splitlines()[-1])


def hf_maker(config: Path, batch: str) -> Callable[[], Task]:
    """Returns what makes the causal language model of a config.json, with AdamW and batches of that size.

    Raises:
        ValueError: no such file, no batch, or transformers does not know the model.
        ImportError: transformers is not installed.
    """
    shape = re.fullmatch(r"(\d+)x(\d+)", batch)
    path = config / "config.json" if config.is_dir() else config
    if shape is None:
        raise ValueError(f"batch {batch!r}: expected sequences x tokens, 4x2048")
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = json.loads(path.read_text())
    for key in ("dtype", "torch_dtype"):  # of the file's weights: which dtype they train in, the mode says
        settings.pop(key, None)
    try:
        known = AutoConfig.for_model(settings.pop("model_type"), **settings)
    except KeyError as error:
        raise ValueError(f"{path}: no model_type that transformers knows: {error}") from None
    sequences, tokens = map(int, shape.groups())

    def make() -> Task:
        model = AutoModelForCausalLM.from_config(known)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)

        def batches(seed: int) -> Any:
            while True:
                ids = torch.zeros(sequences, tokens, dtype=torch.int64)
                yield {"input_ids": ids, "labels": ids}

        return Task(model, optimizer, batches)

    return make


def parse_bytes(amount: str | int) -> int:
    """Returns bytes of "24GB" (powers of 1000), "24GiB" (of 1024), or a number.

    Raises:
        ValueError: it is none of these.
    """
    found = re.fullmatch(r"([\d.]+)\s*([KMGT]?)(i?)B?", str(amount).strip(), re.IGNORECASE)
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:
        number = 0.0
    if found is None or number <= 0:
        raise ValueError(f"{amount!r} is no amount of memory: expected 24GB or 24GiB")
    return round(number * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " "))
