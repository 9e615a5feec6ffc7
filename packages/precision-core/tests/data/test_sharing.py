"""Data shared out among processes: each sample to one rank, in a new order every epoch, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from precision_core.data.sharing import share_out


class Numbers(Dataset[int]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(4))


def epochs(loader: Any, count: int = 1, world_size: int = 2) -> list[list[list[int]]]:
    """Returns [epoch][rank] -> the samples that rank saw."""
    shares = [share_out(loader, rank, world_size) for rank in range(world_size)]
    return [[[int(x) for batch in share for x in batch] for share in shares] for _ in range(count)]


def test_each_sample_goes_to_one_rank_in_order() -> None:
    assert epochs(DataLoader(Numbers(8), batch_size=2)) == [[[0, 2, 4, 6], [1, 3, 5, 7]]]


def test_shuffling_is_new_every_epoch_and_the_same_for_all_ranks() -> None:
    torch.manual_seed(3)
    first, second = epochs(DataLoader(Numbers(40), batch_size=5, shuffle=True), count=2)
    for epoch in (first, second):
        assert sorted(epoch[0] + epoch[1]) == list(range(40))
    assert first != second
    torch.manual_seed(3)
    assert epochs(DataLoader(Numbers(40), batch_size=5, shuffle=True))[0] == first
    torch.manual_seed(4)
    assert epochs(DataLoader(Numbers(40), batch_size=5, shuffle=True))[0] != first


def test_what_does_not_divide_is_repeated_or_dropped() -> None:
    assert epochs(DataLoader(Numbers(5), batch_size=1)) == [[[0, 2, 4], [1, 3, 0]]]
    assert epochs(DataLoader(Numbers(5), batch_size=1, drop_last=True)) == [[[0, 2], [1, 3]]]


def test_a_batch_sampler_of_torch_is_taken_apart() -> None:
    batches = BatchSampler(RandomSampler(Numbers(12)), batch_size=2, drop_last=True)
    (first, second), (third, _) = epochs(DataLoader(Numbers(12), batch_sampler=batches), count=2)
    assert sorted(first + second) == list(range(12)) and first != third
    share: Any = share_out(DataLoader(Numbers(12), batch_sampler=batches), 0, 2)
    assert [len(batch) for batch in share] == [2, 2, 2]


def test_a_loader_that_does_not_batch_is_shared_out_too() -> None:
    share: Any = share_out(DataLoader(Numbers(6), batch_size=None), 1, 2)
    assert [int(x) for x in share] == [1, 3, 5]


def test_set_epoch_is_heard() -> None:
    loader = DataLoader(Numbers(40), batch_size=40, shuffle=True)
    share: Any = share_out(loader, 0, 2)
    first = next(iter(share)).tolist()
    assert next(iter(share)).tolist() != first
    share.sampler.set_epoch(0)
    assert next(iter(share)).tolist() == first


def test_options_of_the_loader_are_kept() -> None:
    def collate(samples: list[int]) -> list[int]:
        return [-each for each in samples]

    share: Any = share_out(DataLoader(Numbers(6), batch_size=3, collate_fn=collate, num_workers=1, timeout=9), 1, 2)
    assert (share.batch_size, share.num_workers, share.timeout) == (3, 1, 9)
    assert list(share) == [[-1, -3, -5]]


@pytest.mark.parametrize(
    "loader",
    [
        [1, 2, 3],
        DataLoader(Stream()),
        DataLoader(Numbers(4), sampler=DistributedSampler(Numbers(4), 2, 0)),
        DataLoader(
            Numbers(4), batch_sampler=BatchSampler(DistributedSampler(Numbers(4), 2, 0), batch_size=2, drop_last=False)
        ),
    ],
    ids=["list", "iterable", "sampler", "batch sampler"],
)
def test_what_shares_out_by_itself_is_left_alone(loader: Any) -> None:
    assert share_out(loader, 0, 2) is loader


class MyLoader(DataLoader[int]):
    pass


class MyBatches(BatchSampler):
    pass


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (MyLoader(Numbers(4)), "rebuild a MyLoader"),
        (DataLoader(Numbers(4), sampler=WeightedRandomSampler([1.0] * 4, 4)), "a WeightedRandomSampler"),
        (DataLoader(Numbers(4), sampler=RandomSampler(Numbers(4), replacement=True)), "with replacement"),
        (DataLoader(Numbers(4), sampler=RandomSampler(Numbers(4), num_samples=2)), "with replacement or num_samples"),
        (
            DataLoader(
                Numbers(4), batch_sampler=MyBatches(SequentialSampler(Numbers(4)), batch_size=2, drop_last=False)
            ),
            "a MyBatches",
        ),
    ],
)
def test_what_cannot_be_shared_out_is_refused_with_the_way_out(loader: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"{message}.*use_distributed_sampler=False"):
        share_out(loader, 0, 2)
