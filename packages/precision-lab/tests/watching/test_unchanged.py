"""Updates that round to nothing are counted, but not where something keeps what is cut off."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from precision_lab.watching.unchanged import Unchanged


def of(optimizer: torch.optim.Optimizer, details: bool = False) -> Unchanged:
    return Unchanged(optimizer, lambda param: "w", details)


def test_counts() -> None:
    param = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    param.grad = torch.tensor([1.0, 2.0**-12, 0.0, 0.0]).bfloat16()
    optimizer = torch.optim.SGD([param], lr=1.0)
    taken = of(optimizer, details=True)
    optimizer.step()
    names, counts = taken.counts()
    assert names == ["w"] and counts is not None and counts.tolist() == [[1, 2]]
    (before,) = taken.before.params
    assert before.value.tolist() == [1.0] * 4 and before.live.tolist() == [0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("key", ["master_param", "kahan_comp", "compensation"])
def test_what_is_kept_elsewhere_is_left_out(key: str) -> None:
    param = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    optimizer = torch.optim.SGD([param], lr=1.0)
    optimizer.state[param][key] = torch.zeros(4)
    assert of(optimizer).counts() == ([], None)
    del optimizer.state[param][key]
    optimizer.param_groups[0]["lr"] = 0.0
    assert of(optimizer).counts() == ([], None)
