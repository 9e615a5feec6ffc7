"""For how many values the host waits in ten steps of each mode and strategy: the table in precision-core's README.

Counted by `precision_core.testing.reads_of_ten_steps` on one rank on a CPU that plays a GPU. `--write` puts the table
into the README; each package's tests hold its own part of it.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from precision_core import MODES, Fabric, Strategy
from precision_core.support import resolve_strategy
from precision_core.testing import reads_of_ten_steps, run_in_ranks

README = Path(__file__).parents[1] / "packages" / "precision-core" / "README.md"
BEGIN, END = "<!-- written by benchmarks/count_host_reads.py -->", "<!-- until here -->"
COLUMNS = ("one device", "ddp", "fsdp", *(f"deepspeed {stage}" for stage in range(4)))
ROWS = (
    *(*MODES, "nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training"),
    *("fp8-reference", "fp8-current-reference", "mxfp8-reference", "nvfp4-reference"),
)
REFUSED = "-"


def counts(column: str) -> dict[str, str]:
    """Returns how often ten steps read a value, for each mode, in one rank; "-" where the strategy refuses it."""
    (found,) = run_in_ranks(1, partial(_counts, column), timeout=600)
    return found


def _counts(column: str) -> dict[str, str]:
    return {mode: _count(mode, column) for mode in ROWS}


def _count(mode: str, column: str) -> str:
    with _accelerator_named_like_a_gpu(column):
        try:
            fabric = Fabric("cpu", _strategy(column), devices=1, precision=mode)
        except ValueError:
            return REFUSED
        return str(sum(reads_of_ten_steps(fabric, clip={"max_norm": 1.0}).values()))


def _strategy(column: str) -> str | Strategy:
    name, _, stage = column.partition(" ")
    if name != "deepspeed":
        return "auto" if column == "one device" else name
    kind = type(resolve_strategy(name, "cpu", "auto", 1)[0])
    return kind(int(stage))  # type: ignore[call-arg]


@contextmanager
def _accelerator_named_like_a_gpu(column: str) -> Iterator[None]:
    """Context in which DeepSpeed calls its device "cpu:0": moves to its device, named "cpu", would look like reads. It
    also says there that it has float16, which any CPU computes in."""
    if not column.startswith("deepspeed"):
        yield
        return
    kind = type(importlib.import_module("deepspeed.accelerator").get_accelerator())
    before = kind.device_name, kind.current_device_name, kind.is_fp16_supported
    kind.device_name = lambda self, index=None: "cpu:0"
    kind.current_device_name = lambda self: "cpu:0"
    kind.is_fp16_supported = lambda self: True
    try:
        yield
    finally:
        kind.device_name, kind.current_device_name, kind.is_fp16_supported = before


def table(columns: Mapping[str, Mapping[str, str]]) -> str:
    """Returns the table of the counts by column and mode, between its marks."""
    lines = [("mode", *columns), ("---",) * (len(columns) + 1)]
    lines += [(f"`{mode}`", *(column[mode] for column in columns.values())) for mode in ROWS]
    return "\n".join([BEGIN, *(f"| {' | '.join(line)} |" for line in lines), END])


def in_readme() -> dict[tuple[str, str], str]:
    """Returns the README's cells by mode and column."""
    block = README.read_text().partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    head, _, *lines = [[cell.strip(" `") for cell in line.strip("| ").split(" | ")] for line in block]
    return {(mode, name): cell for mode, *cells in lines for name, cell in zip(head[1:], cells, strict=True)}


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--write", action="store_true", help="puts the table into precision-core's README")
    given = options.parse_args()
    warnings.simplefilter("ignore")  # what the vendors do with this torch
    for vendor in ("deepspeed", "bitsandbytes"):  # once, before ranks are forked
        importlib.import_module(vendor)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    made = table({column: counts(column) for column in COLUMNS})
    if given.write:
        before, _, rest = README.read_text().partition(BEGIN)
        README.write_text(before + made + rest.partition(END)[2])
    else:
        print(made)


if __name__ == "__main__":
    main()
