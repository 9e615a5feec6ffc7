"""Loading: batches arrive as they were built, in the loop's order, and resume where they were."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from precision_core import Fabric
from precision_xla import vendor

Pair = namedtuple("Pair", "x y")


@dataclass
class Batch:
    ids: Tensor
    weight: Tensor
    name: str


class Noisy(Dataset[Tensor]):
    """Adds noise in the process that loads."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return index + torch.rand(2)


def fabric_of() -> Fabric:
    return Fabric(accelerator="cpu", strategy="xla")


def test_batches_keep_containers_dtypes_and_shared_tensors() -> None:
    fabric = fabric_of()
    shared = torch.ones(2, dtype=torch.float64)
    data = [Batch(torch.arange(3), shared, "a"), Pair(shared, [shared, {"k": torch.tensor(True)}]), "text", 3]
    first, second, third, fourth = fabric.setup_dataloaders(data)
    assert type(first) is Batch and first.ids.device == fabric.device and first.ids.dtype is torch.int64
    assert first.weight.dtype is torch.float64 and first.name == "a" and data[0].ids.is_cpu  # type: ignore[union-attr]
    assert type(second) is Pair and second.x is second.y[0] and second.y[1]["k"].dtype is torch.bool
    assert second.x.device == fabric.device and torch.equal(second.x.cpu(), shared)
    assert (third, fourth) == ("text", 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_all_batches_come_in_order_and_the_graph_ends_at_each(workers: int) -> None:
    fabric = fabric_of()
    loader = fabric.setup_dataloaders(DataLoader(range(20), batch_size=2, num_workers=workers))  # type: ignore[arg-type]
    seen, total = [], torch.zeros((), device=fabric.device)
    for number, batch in enumerate(loader):
        if number == 3:
            before = vendor.counts()
        total = total + batch.sum()
        seen.append(batch)
    done = vendor.counts() - before
    assert (done.executions, done.reads) == (7, 0) and done.compilations <= 1
    assert torch.cat(seen).tolist() == list(range(20)) and total.item() == 190
    for batch in loader:
        assert batch.tolist() == [0, 1]
        break  # the next pass starts anew
    assert len(list(loader)) == 10


class Broken(IterableDataset[int]):
    def __iter__(self) -> Any:
        yield from range(4)
        raise OSError("the disk is gone")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_the_data_is_raised_and_not_taken_for_the_end(workers: int) -> None:
    loader = fabric_of().setup_dataloaders(DataLoader(Broken(), batch_size=2, num_workers=workers))
    seen = []
    with pytest.raises(OSError, match="the disk is gone"):
        for batch in loader:
            seen.append(batch.tolist())
    assert seen == [[0, 1], [2, 3]]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_goes_on_with_the_very_next_batch(tmp_path: Path, workers: int) -> None:
    def run(upto: int | None, load: bool = False) -> list[float]:
        Fabric.seed_everything(7 if not load else 8)
        fabric = fabric_of()
        loader = fabric.setup_dataloaders(DataLoader(Noisy(), batch_size=1, shuffle=True, num_workers=workers))
        if load:
            fabric.load(tmp_path / "half.ckpt", {"loader": loader})
        values = []
        for number, batch in enumerate(loader):
            values.append(batch.sum().item())
            if number + 1 == upto:
                fabric.save(tmp_path / "half.ckpt", {"loader": loader})
                break
        return values

    whole = run(None)
    assert len(whole) == 8 and run(3) + run(None, load=True) == whole
