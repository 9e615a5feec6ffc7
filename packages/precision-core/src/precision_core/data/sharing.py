"""Data loaders that give each process its share of the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler


def share_out(loader: Iterable[Any], rank: int, world_size: int) -> Iterable[Any]:
    """Returns a loader like `loader` with this rank's share of the data, reshuffled every epoch if `loader` shuffles.

    Anything but a DataLoader, and one with an iterable dataset or a DistributedSampler, is returned as it is. All ranks
    get the same number of samples: if the data does not divide evenly, some come twice, as with torch's sampler.

    Raises:
        ValueError: a subclass of DataLoader, or a custom sampler.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    if isinstance(_sampler(loader), DistributedSampler):
        return loader
    way_out = "share its data out by rank yourself, and pass use_distributed_sampler=False"
    if type(loader) is not DataLoader:
        raise ValueError(
            f"setup_dataloaders cannot rebuild a {type(loader).__name__} with another sampler: {way_out}"
            " [loader-sharing]"
        )
    own = next((each for each in (loader.batch_sampler, _sampler(loader)) if not _is_torchs(each)), None)
    if own is not None:
        raise ValueError(f"setup_dataloaders cannot share out a {type(own).__name__}: {way_out} [loader-sharing]")
    given = _sampler(loader)
    shuffles = isinstance(given, RandomSampler)
    if isinstance(given, RandomSampler) and (given.replacement or given.num_samples != len(given.data_source)):
        raise ValueError(
            f"setup_dataloaders cannot share out a RandomSampler with replacement or num_samples: {way_out}"
            " [loader-sharing]"
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
    if isinstance(loader.batch_sampler, BatchSampler):  # a loader given one has no batch_size and drop_last
        kept |= {name: getattr(loader.batch_sampler, name) for name in ("batch_size", "drop_last")}
    if loader.num_workers == 0:  # torch rejects options of workers then
        kept = {name: value for name, value in kept.items() if name not in _OF_WORKERS}
    return DataLoader(loader.dataset, sampler=sampler, **kept)


class EpochSampler(DistributedSampler[Any]):
    """A DistributedSampler that counts epochs itself; `set_epoch` still works."""

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
    """Returns the sampler of indices, also if it is inside a batch sampler."""
    return getattr(loader.batch_sampler, "sampler", loader.sampler)


def _is_torchs(sampler: object) -> bool:
    return sampler is None or type(sampler) in (BatchSampler, RandomSampler, SequentialSampler)


def _seed(loader: DataLoader[Any]) -> int:
    """Returns the generator's initial seed: all ranks shuffle alike if they were seeded alike."""
    generator = loader.generator or getattr(_sampler(loader), "generator", None)
    return int((generator or torch.default_generator).initial_seed() % 2**32)
