"""DeviceLoader's state: a run that was interrupted in the middle of an epoch goes on with the very next batch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
)

from precision_core import CheckpointError, Fabric

SIZE = 23


class Noisy(Dataset[Any]):
    """Draws from every generator that a dataset may draw from, in this process or in a worker."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        return index, torch.rand(()).item(), random.random(), float(np.random.rand())


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[tuple[int, float]]:
        worker = torch.utils.data.get_worker_info()
        start, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return ((index, torch.rand(()).item()) for index in range(start, SIZE, step))


class PythonSampler(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        order = list(range(SIZE))
        random.shuffle(order)
        return iter(order)

    def __len__(self) -> int:
        return SIZE


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def own_generator() -> DataLoader[Any]:
    return DataLoader(Noisy(), 4, sampler=RandomSampler(Noisy(), generator=seeded()))


def bootstrap() -> DataLoader[Any]:
    sampler = RandomSampler(Noisy(), replacement=True, num_samples=40, generator=seeded())
    return DataLoader(Noisy(), 4, sampler=sampler)


def batch_sampler() -> DataLoader[Any]:
    batches = BatchSampler(RandomSampler(Noisy(), generator=seeded()), 5, drop_last=False)
    return DataLoader(Noisy(), batch_sampler=batches)


def distributed() -> DataLoader[Any]:
    return DataLoader(Noisy(), 4, sampler=DistributedSampler(Noisy(), num_replicas=2, rank=1))


LOADERS = {
    "in order": lambda: DataLoader(Noisy(), 4),
    "shuffled": lambda: DataLoader(Noisy(), 4, shuffle=True),
    "shuffled, a generator": lambda: DataLoader(Noisy(), 4, shuffle=True, generator=seeded()),
    "a sampler's generator": own_generator,
    "with replacement": bootstrap,
    "weighted": lambda: DataLoader(Noisy(), 4, sampler=WeightedRandomSampler(range(1, SIZE + 1), SIZE)),
    "batch sampler": batch_sampler,
    "python's random": lambda: DataLoader(Noisy(), 4, sampler=PythonSampler()),
    "distributed": distributed,
    "no batches": lambda: DataLoader(Noisy(), batch_size=None, shuffle=True),
    "stream": lambda: DataLoader(Stream(), 4),
    "shuffled, 2 workers": lambda: DataLoader(Noisy(), 4, shuffle=True, num_workers=2),
    "a generator, 2 workers": lambda: DataLoader(Noisy(), 4, shuffle=True, num_workers=2, generator=seeded()),
    "stream, 2 workers": lambda: DataLoader(Stream(), 4, num_workers=2),
    "a plain list": lambda: [torch.tensor([index]) for index in range(6)],
}


def plain(batch: Any) -> Any:
    return [part.tolist() if isinstance(part, torch.Tensor) else part for part in batch]


def draws() -> list[float]:
    return [torch.rand(()).item(), random.random(), float(np.random.rand())]


def run(moved: Any, batches: int | None = None) -> list[Any]:
    """Returns batches, and what a model with dropout would draw after each."""
    log = []
    for batch in moved:
        log.append((plain(batch), draws()))
        if batches is not None and len(log) == batches:
            break
    return log


def fabric() -> Fabric:
    return Fabric(accelerator="cpu")


PLACES: list[tuple[int, Any]] = [(0, 1), (1, 3), (0, 0), (0, None), (0, "all")]
FAST = {("a generator, 2 workers", 0, 1), ("stream, 2 workers", 1, 3)}  # workers take long to start
CASES = [
    pytest.param(name, epochs, batches, marks=[pytest.mark.full] if slow else [])
    for name in LOADERS
    for epochs, batches in PLACES[: 2 if "workers" in name else 5]
    if (slow := "workers" in name and (name, epochs, batches) not in FAST) is not None
]


@pytest.mark.parametrize(("name", "epochs", "batches"), CASES)
def test_the_next_batch_and_every_later_epoch_are_the_same(
    name: str, epochs: int, batches: int | str | None, tmp_path: Path
) -> None:
    Fabric.seed_everything(1)
    moved = fabric().setup_dataloaders(LOADERS[name]())
    for _ in range(epochs):
        run(moved)
    if batches is not None:
        iterator = iter(moved)
        for _ in range(len(list(LOADERS[name]())) if batches == "all" else int(batches)):
            next(iterator)
    before = draws()
    fabric().save(tmp_path / "last.ckpt", {"loader": moved})
    expected = run(iterator) if batches is not None else []
    expected += run(moved) + run(moved)

    Fabric.seed_everything(2)
    other = fabric().setup_dataloaders(LOADERS[name]())
    fabric().load(tmp_path / "last.ckpt", {"loader": other})
    resumed = run(other) if batches is not None else []
    assert resumed + run(other) + run(other) == expected and len(before) == 3


def test_a_loop_that_breaks_goes_on_where_it_broke(tmp_path: Path) -> None:
    Fabric.seed_everything(1)
    expected = run(fabric().setup_dataloaders(LOADERS["shuffled"]()))
    Fabric.seed_everything(1)
    moved = fabric().setup_dataloaders(LOADERS["shuffled"]())
    first = run(moved, 2)
    fabric().save(tmp_path / "last.ckpt", {"loader": moved})
    moved = fabric().setup_dataloaders(LOADERS["shuffled"]())
    fabric().load(tmp_path / "last.ckpt", {"loader": moved})
    assert first + run(moved) == expected


def test_an_epoch_that_was_cut_short_on_purpose_is_over_when_one_says_so(tmp_path: Path) -> None:
    moved = fabric().setup_dataloaders(LOADERS["shuffled"]())
    run(moved, 2)
    moved.end_epoch()
    fabric().save(tmp_path / "last.ckpt", {"loader": moved})
    expected = run(moved)
    fabric().load(tmp_path / "last.ckpt", {"loader": moved})
    assert run(moved) == expected and moved.state_dict()["epoch"] == 2


def test_skipping_draws_nothing_from_the_streams_that_follow(tmp_path: Path) -> None:
    moved = fabric().setup_dataloaders(LOADERS["shuffled"]())
    run(moved, 3)
    fabric().save(tmp_path / "last.ckpt", {"loader": moved})
    expected = draws()
    fabric().load(tmp_path / "last.ckpt", {"loader": moved})
    iter(moved)
    assert draws() == expected


def test_workers_that_persist_shuffle_as_they_did(tmp_path: Path) -> None:
    """After its first epoch such a loader draws no seed for its workers; their own streams are their own matter."""

    def make() -> Any:
        return fabric().setup_dataloaders(
            DataLoader(range(SIZE), 4, shuffle=True, num_workers=1, persistent_workers=True)  # type: ignore[arg-type]
        )

    moved = make()
    run(moved)
    iterator = iter(moved)
    next(iterator)
    fabric().save(tmp_path / "last.ckpt", {"loader": moved})
    expected = run(iterator) + run(moved)
    moved = make()
    fabric().load(tmp_path / "last.ckpt", {"loader": moved})
    assert run(moved) + run(moved) == expected


class Stateful:
    """A loader with a position of its own, as torchdata's StatefulDataLoader."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.position < 6:
            self.position += 1
            yield torch.tensor([self.position])
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def test_a_loader_with_a_state_of_its_own_is_asked_for_it(tmp_path: Path) -> None:
    moved = fabric().setup_dataloaders(Stateful())
    run(moved, 2)
    assert moved.state_dict() == {"position": 2}
    fabric().save(tmp_path / "last.ckpt", {"loader": moved})
    other = fabric().setup_dataloaders(Stateful())
    fabric().load(tmp_path / "last.ckpt", {"loader": other})
    assert [batch.item() for batch in other] == [3, 4, 5, 6] and [batch.item() for batch in other] == [1, 2, 3, 4, 5, 6]


class StatefulSampler(Stateful, Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return (int(index) for index in super().__iter__())


def test_a_sampler_with_a_position_of_its_own_is_not_skipped_twice(tmp_path: Path) -> None:
    data = list(range(10))
    moved = fabric().setup_dataloaders(DataLoader(data, 2, sampler=StatefulSampler()))  # type: ignore[arg-type]
    run(moved, 1)
    fabric().save(tmp_path / "last.ckpt", {"loader": moved})
    other = fabric().setup_dataloaders(DataLoader(data, 2, sampler=StatefulSampler()))  # type: ignore[arg-type]
    fabric().load(tmp_path / "last.ckpt", {"loader": other})
    assert [batch.tolist() for batch in other] == [[3, 4], [5, 6]]
    ahead = fabric().setup_dataloaders(
        DataLoader(data, 1, sampler=StatefulSampler(), num_workers=1)  # type: ignore[arg-type]
    )
    run(ahead, 1)
    with pytest.raises(ValueError, match="drawn ahead from StatefulSampler"):
        fabric().save(tmp_path / "last.ckpt", {"loader": ahead})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"epoch": 1}, "not the state of a data loader"),
        (
            {"epoch": 0, "batches": 1, "length": 9, "start": {}, "now": {}},
            "cannot resume at batch 1: the checkpoint's loader had 9 batches per epoch, this one has 6. Save at",
        ),
    ],
)
def test_what_does_not_fit_is_refused(state: dict[str, Any], message: str) -> None:
    moved = fabric().setup_dataloaders(LOADERS["in order"]())
    before = str(moved.state_dict())
    with pytest.raises(ValueError, match=message):
        moved.load_state_dict(state)
    assert str(moved.state_dict()) == before


def test_data_that_became_less_is_said(tmp_path: Path) -> None:
    class Short(IterableDataset[Any]):
        size = 5

        def __iter__(self) -> Iterator[int]:
            return iter(range(self.size))

    moved = fabric().setup_dataloaders(DataLoader(Short(), 1))
    run(moved, 4)
    fabric().save(tmp_path / "last.ckpt", {"loader": moved})
    Short.size = 2
    fabric().load(tmp_path / "last.ckpt", {"loader": moved})
    with pytest.raises(ValueError, match="cannot resume at batch 4: the loader ended after 2 batches"):
        iter(moved)


def test_a_load_that_fails_leaves_a_pass_under_way_alone(tmp_path: Path) -> None:
    moved = fabric().setup_dataloaders(LOADERS["a sampler's generator"]())
    iterator = iter(moved)
    next(iterator)
    fabric().save(tmp_path / "last.ckpt", {"loader": moved, "other": Stateful()})
    next(iterator)
    before = str(moved.state_dict())
    with pytest.raises(CheckpointError):
        fabric().load(tmp_path / "last.ckpt", {"loader": moved, "other": Broken()})
    assert str(moved.state_dict()) == before
    next(iterator)
    assert moved.state_dict()["batches"] == 3


class Broken(Stateful):
    def load_state_dict(self, state: dict[str, int]) -> None:
        raise RuntimeError("broken")
