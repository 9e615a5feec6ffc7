"""Variants: a precision together with a change of the task, spelled MODE+VARIANT.

    nf4+lora             the weights quantised and frozen, small adapters trained beside them
    32-true+adam8bit     Adam's states in 8 bits
    nf4+lora+adam8bit    both

A precision says nothing of what trains, or by which optimizer, so these are no precisions: `compare` and `estimate`
alone take them. A task to which one cannot be done, by its model or its optimizer, is a row with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from precision_core.support import install_command
from precision_lab.lora import ALPHA, RANK, add_adapters
from precision_lab.task import Task

VARIANTS: dict[str, str] = {
    "lora": f"adapters of rank {RANK} (scaled by {ALPHA / RANK:g}) on every linear layer train, at the task's learning "
    "rate; all else is frozen as make() built it, so that it is for models that are trained already",
    "adam8bit": "Adam's states in blocks of 8 bits by bitsandbytes, float32 for tensors of fewer than 4096 elements; "
    "on a CPU its first step is compiled, and the peak has what that takes",
}
"""Name -> what is done to the task."""

ROWS = ("32-true+lora", "nf4+lora", "int8+lora", "nf4+lora+adam8bit", "32-true+adam8bit", "bf16-mixed+adam8bit")
"""Those that `--modes all` adds, where their mode is installed."""


def split_variants(mode: str) -> tuple[str, tuple[str, ...]]:
    """Returns the precision and the variants of "nf4+lora+adam8bit".

    Raises:
        ValueError: an unknown variant, or one given twice.
    """
    precision, *names = (part.strip() for part in mode.split("+"))
    for name in names:
        if name not in VARIANTS:
            raise ValueError(f"{mode!r}: unknown variant {name!r}; expected one of {', '.join(VARIANTS)}")
    if len(set(names)) < len(names):
        raise ValueError(f"{mode!r}: a variant is given twice")
    return precision, tuple(name for name in VARIANTS if name in names)


def spelled(precision: str, variants: Sequence[str]) -> str:
    """Returns what `split_variants` takes apart."""
    return "+".join([precision, *variants])


def varied(make: Callable[[], Task], variants: Sequence[str]) -> Callable[[], Task]:
    """Returns `make` with the variants done to its task, in the order of the table."""
    if not variants:
        return make

    def make_varied() -> Task:
        task = make()
        for name in variants:
            _CHANGES[name](task)
        return task

    return make_varied


def _with_8bit_states(task: Task) -> None:
    try:
        from precision_bnb import with_8bit_states
    except ImportError:
        raise ImportError(f"+adam8bit needs precision-bnb: {install_command('bnb')}") from None
    task.optimizer = with_8bit_states(task.optimizer)


_CHANGES: dict[str, Callable[[Task], None]] = {"lora": add_adapters, "adam8bit": _with_8bit_states}
