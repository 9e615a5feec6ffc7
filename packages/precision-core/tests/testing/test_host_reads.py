"""What counts as a read of a tensor's value by the host, what does not, and where it is said to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import AdamW

from precision_core.testing import HostReads, run_in_ranks

X, MASK = torch.arange(4.0), torch.tensor([True, False, True, True])

READS: dict[str, tuple[str, Callable[[], Any]]] = {
    "item": ("item", lambda: X[0].item()),
    "float": ("item", lambda: float(X[0])),
    "if": ("item", lambda: 1 if MASK.all() else 0),
    "is_nonzero": ("item", lambda: torch.is_nonzero(X[0])),
    "in a list": ("item", lambda: torch.tensor([X[0], 1.0])),
    "format": ("item", lambda: f"{X[0]:.2f}"),
    "equal": ("equal", lambda: torch.equal(X, X)),
    "allclose": ("allclose", lambda: torch.allclose(X, X)),
    "cpu": ("cpu", lambda: X.cpu()),
    "to": ('to("cpu")', lambda: X.to("cpu")),
    "to by name": ('to("cpu")', lambda: X.to(device="cpu", non_blocking=True)),
    "tolist": ("tolist", lambda: X.tolist()),
    "numpy": ("numpy", lambda: X.numpy()),
    "repr": ("repr", lambda: repr(X)),
    "nonzero": ("nonzero", lambda: X.nonzero()),
    "where": ("nonzero", lambda: torch.where(MASK)),
    "mask": ("mask", lambda: X[MASK]),
    "mask set": ("mask", lambda: X.clone().__setitem__(MASK, X[:3])),
    "masked_select": ("masked_select", lambda: X.masked_select(MASK)),
    "unique": ("unique", lambda: X.unique()),
    "repeat_interleave": ("repeat_interleave", lambda: X.repeat_interleave(torch.ones(4, dtype=torch.int64))),
}


@pytest.mark.parametrize("name", READS)
def test_a_read_counts_once_with_its_line(name: str) -> None:
    what, read = READS[name]
    with HostReads() as reads:
        read()
    assert reads.lines == [f"testing/test_host_reads.py:{read.__code__.co_firstlineno} <lambda>: {what}"]
    read()
    assert len(reads) == 1


def test_arithmetic_choices_and_moves_to_the_device_do_not_count() -> None:
    weight = torch.ones(4, requires_grad=True)
    with HostReads() as reads:
        (torch.where(MASK, weight * X[0], 0.0).sum() / X.numel()).backward()
        X.clone().masked_fill_(MASK, 1.0)
        X.to(torch.device("cpu")), X.to(torch.float64), X[torch.tensor([1, 2])], X.clone().clamp_(max=X[1])
        X.repeat_interleave(torch.ones(4, dtype=torch.int64), output_size=4)
        if X.is_cpu:
            X[0].item()
    assert reads.lines == [] and weight.grad is not None


def test_backward_is_seen() -> None:
    weight = torch.ones(4, requires_grad=True)
    weight.register_hook(lambda gradient: gradient * gradient.sum().item())
    with HostReads() as reads:
        weight.sum().backward()
    assert [line.rpartition(" ")[2] for line in reads.lines] == ["item"]


def of_shards() -> list[str]:
    mesh = init_device_mesh("cpu", (1,))
    shards = distribute_tensor(X, mesh, [Shard(0)])
    with HostReads() as reads:
        (shards * 2).sum()
        shards.sum().item()
        torch.equal(shards, shards)
    dist.destroy_process_group()
    return [line.rpartition(" ")[2] for line in reads.lines]


def test_what_dtensors_come_down_to_is_seen_once() -> None:
    assert run_in_ranks(1, of_shards) == [["item", "equal"]]


@pytest.mark.parametrize("fused", [False, True])
def test_the_step_of_an_optimizer_is_the_hosts_unless_it_is_fused(fused: bool) -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = AdamW([weight], fused=fused)
    weight.grad = torch.ones(4)
    optimizer.step()
    with HostReads() as anything:
        optimizer.state[weight]["step"].item()
    with HostReads(optimizer) as reads:
        optimizer.step()
        optimizer.state[weight]["step"].item()
    assert len(anything) == 1 and len(reads) == int(fused)
