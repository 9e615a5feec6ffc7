"""Every row of the support table that speaks of this machine's devices holds for real steps."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from precision_core import Fabric, SupportRow
from precision_core.hardware import ACCELERATORS, is_available
from precision_core.support import discovery, read_table
from precision_core.testing import Net, run_in_ranks
from precision_core.testing import train_net as train

TABLE = read_table()
ACCELERATOR = {types[0]: name for name, types in ACCELERATORS.items() if len(types) == 1}


def test_the_whole_table_can_be_read() -> None:
    assert TABLE.problems == []


@pytest.mark.parametrize(
    "row",
    [row for row in TABLE.rows if is_available(row.device)],
    ids=lambda row: f"{row.mode}-{row.device}-{row.strategy}",
)
def test_a_row_holds(row: SupportRow) -> None:
    if row.device != "cpu":  # no fork can use it once this process has
        check(row)
    elif row.strategy == "deepspeed" and row.level != "no":  # it leaves traces: a closure gets a process of its own
        run_in_ranks(1, lambda: check(row))
    else:
        run_in_ranks(1, check, row)


def check(row: SupportRow) -> None:
    def make() -> Fabric:
        return Fabric(accelerator=ACCELERATOR[row.device], strategy=row.strategy or "auto", precision=row.mode)

    if row.level == "no":
        with pytest.raises(ValueError):
            make()
        return
    fabric, model = make(), Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    fabric.setup(model, optimizer)
    losses = train(fabric, model, optimizer, range(20))
    fabric.teardown()
    assert sum(losses[-5:]) < sum(losses[:5]) and fabric.precision_plugin.steps > 0


VENDORS = ("bitsandbytes", "deepspeed", "torch_xla", "torchao", "transformer_engine", "transformers", "peft")


@pytest.mark.slow_start
def test_doctor_imports_no_vendor_of_the_packages_that_are_installed() -> None:
    """precision-lab's own test has made-up packages; these are ours, with their libraries."""
    code = (
        "import sys; from precision_lab.cli import main; main(['doctor', '--json'], standalone_mode=False);"
        f"print(sorted(set({VENDORS!r}) & set(sys.modules)), file=sys.stderr)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert finished.stderr == "[]\n"
    support = {name for package in json.loads(finished.stdout)["packages"] for name in package["support"]}
    assert support >= set(discovery.names(discovery.SUPPORT)) > set()
