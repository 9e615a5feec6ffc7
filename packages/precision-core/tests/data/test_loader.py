"""DeviceLoader: batches on the device, everything else as the loader's own."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from precision_core import Fabric, SingleDeviceStrategy


class Pairs(Dataset[Any]):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": torch.tensor([index + 0.5]), "y": index, "name": str(index), "flag": torch.tensor(index > 2)}


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(Pairs(), batch_size=2, **options)


@pytest.mark.parametrize("mode", ["bf16-true", "64-true", "16-mixed"])
def test_values_and_dtypes_are_untouched_and_it_iterates_again(mode: str) -> None:
    moved = Fabric(accelerator="cpu", precision=mode).setup_dataloaders(loader())
    for _ in range(2):
        batches = list(moved)
        assert torch.equal(torch.cat([batch["x"] for batch in batches]).flatten(), torch.arange(5) + 0.5)
        assert [batch["x"].dtype for batch in batches] == [torch.float32] * 3
        assert [batch["y"].dtype for batch in batches] == [torch.int64] * 3
        assert batches[1]["flag"].tolist() == [False, True] and batches[2]["name"] == ["4"]
    assert len(moved) == 3


def test_every_tensor_of_a_batch_moves_and_nothing_else_changes() -> None:
    fabric = Fabric(strategy=SingleDeviceStrategy("meta"))
    x = torch.ones(2, dtype=torch.float16)
    (batch,) = fabric.setup_dataloaders([{"x": x, "nested": ((x, torch.tensor([1])), None, "text", 3)}])
    moved = [batch["x"], *batch["nested"][0]]
    assert [(each.device.type, each.dtype) for each in moved] == [
        ("meta", torch.float16),
        ("meta", torch.float16),
        ("meta", torch.int64),
    ]
    assert moved[0] is moved[1] and batch["nested"][1:] == (None, "text", 3)
    assert x.device.type == "cpu"


def test_attributes_are_the_loaders() -> None:
    sampler: DistributedSampler[Any] = DistributedSampler(Pairs(), num_replicas=1, rank=0, shuffle=True, seed=0)
    inner = loader(sampler=sampler)
    moved = Fabric(accelerator="cpu").setup_dataloaders(inner)
    assert moved.batch_size == 2 and moved.dataset is inner.dataset and moved.sampler is sampler
    first = [batch["y"].tolist() for batch in moved]
    moved.sampler.set_epoch(1)
    assert [batch["y"].tolist() for batch in moved] != first
    with pytest.raises(AttributeError):
        _ = moved.nothing


def test_one_or_a_tuple_comes_back_and_moving_can_be_left_out() -> None:
    fabric, inner = Fabric(accelerator="cpu"), [torch.ones(1)]
    first, second = fabric.setup_dataloaders(inner, inner)
    assert list(first) == list(second) == inner
    assert fabric.setup_dataloaders(inner, move_to_device=False) is inner


def test_a_loader_without_length_iterates_and_says_so() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([1, 2])

    moved = Fabric(accelerator="cpu").setup_dataloaders(DataLoader(Stream()))
    assert [batch.item() for batch in list(moved)] == [1, 2]
    with pytest.raises(TypeError):
        len(moved)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda moved: pickle.loads(pickle.dumps(moved))])
def test_copies_iterate_too(duplicate: Any) -> None:
    moved = duplicate(Fabric(accelerator="cpu").setup_dataloaders(loader()))
    assert sum(batch["x"].sum().item() for batch in moved) == 12.5 and moved.batch_size == 2
