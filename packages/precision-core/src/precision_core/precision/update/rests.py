"""Rests: the 16 bits that each bfloat16 weight lacks of its float32 value, until somebody else writes the weight."""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from precision_core.precision.update.bits import split
from precision_core.precision.update.layout import local


class Rests:
    """Parameter -> its rest (int16, of its shape and sharding). Keeps no parameter alive.

    A write in place to a parameter (`load_state_dict`, averaged weights) drops its rest: the weight is all there is.
    Writes through `.data` are not counted by torch; after one, the value is up to half a spacing beside the weight.
    """

    def __init__(self) -> None:
        self._entries: MutableMapping[Tensor, tuple[Tensor, int | None]] = WeakIdKeyDictionary()

    def of(self, param: Tensor) -> Tensor | None:
        """Returns the rest of `param`; None: zeros."""
        rest, version = self._entries.get(param, (None, None))
        if rest is None or version is None or version == _version(param):
            return rest
        del self._entries[param]
        return None

    def put(self, param: Tensor, rest: Tensor, *, restored: bool = False) -> None:
        """Takes the rest of the present weight, or of the one that `param` has at the next step (`restored`)."""
        self._entries[param] = (rest, None if restored else _version(param))

    def drop(self, param: Tensor) -> None:
        """Forgets the rest of `param`."""
        self._entries.pop(param, None)


def split_off(value: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the weight (bfloat16) and the rest (int16) of `value`, a float32 tensor, dense or a DTensor."""
    weight, rest = (torch.empty_like(value, dtype=dtype) for dtype in (torch.bfloat16, torch.int16))
    with torch.no_grad():
        split(local(value).clone(), local(weight), local(rest))
    return weight, rest


def _version(param: Tensor) -> int:
    return local(param)._version
