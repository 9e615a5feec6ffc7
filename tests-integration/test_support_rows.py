"""Every row of the support table that speaks of this machine's devices holds for real steps."""

from __future__ import annotations

import pytest
import torch

from precision_core import Fabric, SupportRow
from precision_core.devices import ACCELERATORS, is_available
from precision_core.support_table import read_table
from precision_core.testing import run_in_ranks
from precision_core.testing.checks_loop import train
from precision_core.testing.net import Net

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
