"""Copies saved values to the flat tensors of an optimizer at another stage, or with another number of ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from precision_core.checkpoint import CheckpointError
from precision_deepspeed.checkpoints.saved import Saved


class Fragment(NamedTuple):
    """A part of a parameter: `numel` elements from `offset` on, at `start` of this rank's flat tensor number `flat`."""

    name: str
    flat: int
    start: int
    offset: int
    numel: int


def fill(
    saved: Saved, flats: list[Tensor], fragments: Iterable[Fragment]
) -> tuple[list[Tensor], dict[int, dict[str, Any]]]:
    """Returns master weights in the layout of `flats`, and number of the flat tensor -> the optimizer's state.

    Padding is zero.

    Raises:
        CheckpointError: parameters in one flat tensor have different step counts.
    """
    masters = [torch.zeros_like(flat, requires_grad=False) for flat in flats]
    states: dict[int, dict[str, Any]] = {}
    for fragment in fragments:
        _copy(saved.master(fragment.name), masters[fragment.flat], fragment)
        state = states.setdefault(fragment.flat, {})
        for key, value in saved.state(fragment.name).items():
            if isinstance(value, Tensor) and value.dim() > 0:
                like = masters[fragment.flat]
                _copy(value, state.setdefault(key, torch.zeros_like(like, dtype=value.dtype)), fragment)
            elif key not in state:
                state[key] = value.clone() if isinstance(value, Tensor) else value  # parameters may share it
            elif state[key] != value:
                raise CheckpointError(
                    f"{saved.folder}: the optimizer has {key}={value} for {fragment.name} and {state[key]} for another "
                    "parameter of its group, and ZeRO keeps one for all: load it with the stage and the number of "
                    "ranks that saved it"
                )
    return masters, {flat: state for flat, state in states.items() if state}


def _copy(value: Tensor, flat: Tensor, fragment: Fragment) -> None:
    part = value.reshape(-1)[fragment.offset : fragment.offset + fragment.numel]
    flat.view(-1)[fragment.start : fragment.start + fragment.numel].copy_(part)
