"""Run: what one process does with the others, where there are none."""

from __future__ import annotations

import pytest
import torch

from precision_core import Fabric


def fabric() -> Fabric:
    return Fabric(accelerator="cpu")


def test_on_one_process_rank_zero_first_runs_the_body_and_hands_its_error_on() -> None:
    host, seen = fabric(), []
    with host.rank_zero_first(), host.rank_zero_first(local=True):
        seen.append(host.node_rank)
    assert seen == [0]
    with pytest.raises(KeyError), host.rank_zero_first():
        raise KeyError("mine")


def test_an_operation_has_two_names_and_takes_one() -> None:
    host, tensor = fabric(), torch.tensor([3])
    assert host.all_reduce(tensor, reduce_op="sum").dtype is torch.int64
    assert host.all_reduce(tensor, "sum", reduce_op=torch.distributed.ReduceOp.SUM).item() == 3
    assert host.all_reduce(tensor, op="avg").dtype is torch.float32
    with pytest.raises(ValueError, match=r"all_reduce\(op='sum', reduce_op='max'\): pass one of them"):
        host.all_reduce(tensor, "sum", reduce_op="max")
    with pytest.raises(ValueError, match=r"all_reduce\(reduce_op='product'\): allowed are mean, sum, min, max"):
        host.all_reduce(tensor, reduce_op="product")
