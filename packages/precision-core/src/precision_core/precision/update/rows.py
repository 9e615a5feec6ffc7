"""Rows: float32 memory for the pieces of a batch, which the next batch uses again: one for values, one for gradients.

Fresh memory costs a CPU page faults, and what does not fit into its cache costs more than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

LARGEST = 1 << 18
"""Elements of a row: what it takes stays in a CPU's cache, and there are enough that calls cost little."""
_BYTES = 0.4
"""Of all rows, at most, for each element that is stepped; half of it where the optimizer allocates beside them."""

_LEAST_BYTES = 1 << 17
"""Of all rows, for small models: what they take is nothing, and calls are all that takes time there."""


class Row:
    """Memory of one dimension, `flat`, and its part for each piece."""

    def __init__(self, flat: Tensor, parts: Sequence[Tensor]) -> None:
        self.flat = flat
        self.parts = parts

    @cached_property
    def words(self) -> list[Tensor]:
        """Returns the parts as int32."""
        return [part.view(torch.int32) for part in self.parts]

    @cached_property
    def halves(self) -> Row:
        """Returns float16 parts of the same shapes, beside each other in the first half of the memory."""
        flat = self.flat.view(torch.float16)[: self.flat.numel()]
        sizes = [part.numel() for part in self.parts]
        parts = [half.view(part.shape) for half, part in zip(flat.split(sizes), self.parts, strict=True)]
        return Row(flat, parts)


def row_of(tensor: Tensor) -> Row:
    """Returns the row of a batch that is one piece."""
    return Row(tensor, [tensor])


class Rows:
    """So many rows of float32, of at most `size` elements each."""

    def __init__(self, count: int, size: int) -> None:
        self._count = count
        self._size = size
        self._memory: Tensor | None = None
        self._cut: tuple[list[torch.Size], list[Row]] = ([], [])

    def cut(self, shapes: list[torch.Size], device: torch.device) -> list[Row]:
        """Returns the rows, cut into parts of these shapes; until the next call nobody else has them."""
        if self._memory is None or self._memory.device != device:
            self._memory, self._cut = torch.empty(self._count, self._size, device=device), ([], [])
        if shapes != self._cut[0]:  # layers repeat
            sizes = [shape.numel() for shape in shapes]
            rows = []
            for flat in self._memory[:, : sum(sizes)].unbind():
                parts = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
                rows.append(Row(flat, parts))
            self._cut = (shapes, rows)
        return self._cut[1]


def copy_all(outs: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies each of `sources` into the one of `outs` in its place, whatever their dtypes."""
    torch._foreach_copy_(outs, sources)  # type: ignore[arg-type]  # one call: takes any sequence


def row_size(total: int, count: int, step: int, *, allocates: bool) -> int:
    """Returns how many elements of `total` to step at a time, a multiple of `step`, where each takes `count` rows.

    `allocates`: the optimizer has memory of its own for what it steps, as all have but fused ones.
    """
    of_rows = max(_LEAST_BYTES, (_BYTES / 2 if allocates else _BYTES) * total)
    return max(step, min(LARGEST, int(of_rows / 4 / count) // step * step))
