"""Data loaders whose data is shared out among processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler


def share_out(loader: Iterable[Any], rank: int, world_size: int) -> Iterable[Any]:
    """Returns a loader like `loader` with rank's share of the data; shuffled anew every epoch if `loader` shuffles.

    What is no DataLoader, has an iterable dataset, or a DistributedSampler, shares out by itself and is returned as it
    is. All ranks get equally many samples: some of them twice where the data does not divide, as torch does.

    Raises:
        ValueError: a subclass of DataLoader, or a sampler of the user's own.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    if isinstance(_sampler(loader), DistributedSampler):
        return loader
    way_out = "share its data out by rank yourself, and pass use_distributed_sampler=False"
    if type(loader) is not DataLoader:
        raise ValueError(
            f"setup_dataloaders cannot make another {type(loader).__name__} with another sampler: {way_out}"
        )
    own = next((each for each in (loader.batch_sampler, _sampler(loader)) if not _is_torchs(each)), None)
    if own is not None:
        raise ValueError(f"setup_dataloaders does not know how to share out a {type(own).__name__}: {way_out}")
    given = _sampler(loader)
    shuffles = isinstance(given, RandomSampler)
    if isinstance(given, RandomSampler) and (given.replacement or given.num_samples != len(given.data_source)):
        raise ValueError(
            f"setup_dataloaders does not share out a RandomSampler with replacement or num_samples: {way_out}"
        )
    sampler = EpochSampler(
        loader.dataset,
        world_size,
        rank,
        shuffle=shuffles,
        seed=_seed(loader),
        drop_last=getattr(loader.batch_sampler, "drop_last", False),
    )
    kept = {name: getattr(loader, name) for name in _KEPT if hasattr(loader, name)}  # torch drops some
    if isinstance(loader.batch_sampler, BatchSampler):  # who passes one has a loader without batch_size and drop_last
        kept |= {name: getattr(loader.batch_sampler, name) for name in ("batch_size", "drop_last")}
    if loader.num_workers == 0:  # torch refuses the others' options then
        kept = {name: value for name, value in kept.items() if name not in _OF_WORKERS}
    return DataLoader(loader.dataset, sampler=sampler, **kept)


class EpochSampler(DistributedSampler[Any]):
    """A DistributedSampler that counts its epochs, so that nobody has to call `set_epoch`; who does, is heard."""

    def __iter__(self) -> Iterator[Any]:
        indices = super().__iter__()
        self.epoch += 1
        return indices


_OF_WORKERS = ("timeout", "prefetch_factor", "persistent_workers", "multiprocessing_context")
_KEPT = (
    "batch_size",
    "num_workers",
    "collate_fn",
    "pin_memory",
    "drop_last",
    "worker_init_fn",
    "generator",
    "pin_memory_device",
    "in_order",
    *_OF_WORKERS,
)


def _sampler(loader: DataLoader[Any]) -> Any:
    """Returns what gives the indices, also where it stands inside a batch sampler."""
    return getattr(loader.batch_sampler, "sampler", loader.sampler)


def _is_torchs(sampler: object) -> bool:
    return sampler is None or type(sampler) in (BatchSampler, RandomSampler, SequentialSampler)


def _seed(loader: DataLoader[Any]) -> int:
    """Returns the seed of the shuffling: the generator's, so that all ranks agree if they were seeded alike."""
    generator = loader.generator or getattr(_sampler(loader), "generator", None)
    return int((generator or torch.default_generator).initial_seed() % 2**32)
