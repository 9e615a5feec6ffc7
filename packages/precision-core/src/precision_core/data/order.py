"""What a data loader's order is drawn from: global random generators, its own, its samplers' seeds and epochs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset

from precision_core.data.rng import rng_state, set_rng_state

_CPU = torch.device("cpu")  # where samplers draw


def capture(loader: Any) -> dict[str, Any]:
    """Returns the states of the global and the loader's generators, and its samplers' epochs and seeds."""
    parts = dict(_parts(loader))
    return {
        "rng": rng_state(_CPU),
        "generators": {name: part.generator.get_state() for name, part in parts.items() if _has_generator(part)},
        "epochs": {name: (part.epoch, getattr(part, "seed", None)) for name, part in parts.items() if _has_epoch(part)},
    }


def recall(loader: Any, captured: dict[str, Any], *, globals_too: bool = True) -> None:
    """Restores what `capture` returned; generators that the loader no longer has are skipped."""
    if globals_too:
        set_rng_state(captured["rng"], _CPU)
    for name, part in _parts(loader):
        if name in captured["generators"] and _has_generator(part):
            part.generator.set_state(captured["generators"][name])
        if name in captured["epochs"] and _has_epoch(part):
            epoch, seed = captured["epochs"][name]
            part.set_epoch(epoch)
            if type(seed) is int:  # a DistributedSampler draws its order from both
                part.seed = seed


def stateful_sampler(loader: Any) -> Any:
    """Returns the sampler or batch sampler that keeps its own position by `state_dict`, or None."""
    for _, part in _parts(loader):
        if part is not loader and _is_stateful(part):
            return part
    return None


def keeps_own_state(loader: Any) -> bool:
    """Whether the loader itself has `state_dict` and `load_state_dict`, as torchdata's StatefulDataLoader."""
    return _is_stateful(loader)


def length(loader: Any) -> int | None:
    """Returns the number of batches, or None where the loader does not know.

    An iterable dataset is not asked: a DataLoader that was would warn when more batches come.
    """
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        return None
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _parts(loader: Any) -> Iterator[tuple[str, Any]]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    yield "loader", loader
    yield "sampler", getattr(loader, "sampler", None)
    yield "batch_sampler", batch_sampler
    yield "batch_sampler.sampler", getattr(batch_sampler, "sampler", None)


def _has_generator(part: Any) -> bool:
    return isinstance(getattr(part, "generator", None), torch.Generator)


def _has_epoch(part: Any) -> bool:
    return callable(getattr(part, "set_epoch", None)) and type(getattr(part, "epoch", None)) is int


def _is_stateful(part: Any) -> bool:
    return all(callable(getattr(part, name, None)) for name in ("state_dict", "load_state_dict"))
