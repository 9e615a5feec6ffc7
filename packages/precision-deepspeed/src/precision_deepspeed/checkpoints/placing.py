"""Values that one number of ranks and stage has saved, in the flat tensors that the optimizer of another one steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from precision_core.checkpoint import CheckpointError
from precision_deepspeed.checkpoints.saved import Saved


class Place(NamedTuple):
    """A part of a parameter: `numel` elements from `offset` on, at `start` of this rank's flat tensor number `flat`."""

    name: str
    flat: int
    start: int
    offset: int
    numel: int


def fill(saved: Saved, flats: list[Tensor], places: Iterable[Place]) -> tuple[list[Tensor], dict[int, dict[str, Any]]]:
    """Returns master weights like `flats`, and the optimizer's state for each of them by its number.

    What no parameter lies in is zero: padding.

    Raises:
        CheckpointError: parameters in one flat tensor have had different numbers of steps.
    """
    masters = [torch.zeros_like(flat, requires_grad=False) for flat in flats]
    states: dict[int, dict[str, Any]] = {}
    for place in places:
        _copy(saved.master(place.name), masters[place.flat], place)
        state = states.setdefault(place.flat, {})
        for key, value in saved.state(place.name).items():
            if isinstance(value, Tensor) and value.dim() > 0:
                like = masters[place.flat]
                _copy(value, state.setdefault(key, torch.zeros_like(like, dtype=value.dtype)), place)
            elif key not in state:
                state[key] = value.clone() if isinstance(value, Tensor) else value  # several may have come from one
            elif state[key] != value:
                raise CheckpointError(
                    f"{saved.folder}: the optimizer has {key}={value} for {place.name} and {state[key]} for another "
                    "parameter of its group; ZeRO keeps one for all: only as many ranks at the same stage load it"
                )
    return masters, {flat: state for flat, state in states.items() if state}


def _copy(value: Tensor, flat: Tensor, place: Place) -> None:
    part = value.reshape(-1)[place.offset : place.offset + place.numel]
    flat.view(-1)[place.start : place.start + place.numel].copy_(part)
