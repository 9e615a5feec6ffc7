"""Rests: what is stored beside each half weight for its float32 value, until somebody else writes the weight."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from precision_core.precision.update.bits import split
from precision_core.precision.update.layout import local
from precision_core.precision.update.rows import Row, copy_all


class Rests:
    """Parameter -> its rest, of its shape and sharding: int16, or the full float32 value. Keeps no parameter alive.

    A write in place to a parameter (`load_state_dict`, averaged weights) drops its rest: the weight is all there is.
    Writes through `.data` are not counted by torch. After one, a bfloat16 weight and its bits are up to half a spacing
    beside what was written; a full value gives way to the weight where it is another (`reconcile`).
    """

    def __init__(self) -> None:
        self._entries: MutableMapping[Tensor, tuple[Tensor, int | None]] = WeakIdKeyDictionary()

    def of(self, param: Tensor) -> Tensor | None:
        """Returns the rest of `param`; None: the weight is all there is."""
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


def reconcile(master: Tensor, weight: Tensor) -> None:
    """Gives `master` (float32) the value of `weight` (float16), in place, wherever it does not round to that.

    Somebody wrote the weight there in a way that torch does not count. Reads no value from the device.
    """
    memory = torch.empty(master.numel(), device=master.device)
    reconcile_all([master], [weight], Row(memory, [memory.view(master.shape)]))


def reconcile_all(masters: Sequence[Tensor], weights: Sequence[Tensor], scratch: Row) -> None:
    """Does what `reconcile` does with each; `scratch` is overwritten."""
    differ = scratch.halves
    copy_all(differ.parts, masters)
    for part, weight in zip(differ.parts, weights, strict=True):
        part.view(torch.int16).bitwise_xor_(weight.view(torch.int16))  # float16 is slow to compare on a CPU
    if differ.flat.is_cpu and not bool(differ.flat.view(torch.uint8).any()):  # no wait there, and one pass less
        return
    for part, master, weight in zip(differ.parts, masters, weights, strict=True):
        master.copy_(torch.where(part.view(torch.int16) == 0, master, weight))


def _version(param: Tensor) -> int:
    return (param if type(param) is nn.Parameter else local(param))._version
