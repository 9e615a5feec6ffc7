"""Packed weights: everything that a quantised weight is, as the bytes of one tensor.

    codes        2 a byte (4 bits, the first in the high half) or 1 a byte (int8), in the order of (rows, columns)
    scales       the largest magnitude of each block of 4 bits, or of each row of 8: float32, or codes of 1 byte
    scales of    with double quantisation: float32, one for 256 scales
      scales     ... and the mean that was subtracted: float32, one
    footer       32 bytes: a magic number, type, block size and shape

Each part starts at a multiple of 16 bytes, so that it can be viewed in its dtype, and the whole in any storage dtype.

One tensor, because whatever handles a model's parameters then handles these: names in a state_dict stay what they were,
DDP sends scales once and not in each forward, FSDP2 shards and gathers them with their codes, and no cast of buffers
rounds them.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TYPES = ("nf4", "fp4", "int8")
NESTED_BLOCK = 256
"""Scales that share a scale of their own; bitsandbytes has no other."""

_ALIGNMENT = 16
_FOOTER = struct.Struct("<8sBBBxIQQ")
_FOOTER_BYTES = 32
_MAGIC = b"bnbpack\x01"


@dataclass(frozen=True)
class Format:
    """How weights are quantised; `block_size`, the weights that share a scale, and `double_quant` are for 4 bits."""

    quant_type: str
    block_size: int = 64
    double_quant: bool = False
    storage: torch.dtype = torch.uint8

    def __str__(self) -> str:
        name = self.quant_type + "-dq" * self.double_quant
        blocks = "" if self.quant_type == "int8" else f" in blocks of {self.block_size}"
        return f"{name}{blocks}" + ("" if self.storage is torch.uint8 else f" stored as {self.storage}")


class Parts(NamedTuple):
    """Views of packed weights; `nested` and `offset` are None without double quantisation."""

    codes: Tensor
    """uint8 (count,) of 4 bits, int8 (rows, columns) of 8."""
    scales: Tensor
    nested: Tensor | None
    offset: Tensor | None


@dataclass(frozen=True)
class Layout:
    """The byte offsets of the parts of packed weights (rows, columns)."""

    format: Format
    rows: int
    columns: int

    def __post_init__(self) -> None:
        weights = self.rows * self.columns
        if self.format.quant_type == "int8":
            sizes = [weights, 4 * self.rows, 0, 0]
        else:
            blocks = math.ceil(weights / self.format.block_size)
            nested = math.ceil(blocks / NESTED_BLOCK)
            dq = self.format.double_quant
            sizes = [math.ceil(weights / 2), *([blocks, 4 * nested, 4] if dq else [4 * blocks, 0, 0])]
        spans, start = [], 0
        for size in sizes:
            spans.append((start, start + size))
            start += math.ceil(size / _ALIGNMENT) * _ALIGNMENT
        object.__setattr__(self, "_spans", tuple(spans))  # no field: torch 2.9 traces only what __init__ takes

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Start and end in bytes of codes, scales, scales of scales, and mean; computed once."""
        spans: tuple[tuple[int, int], ...] = self._spans  # type: ignore[attr-defined]
        return spans

    @property
    def nbytes(self) -> int:
        """The size of packed weights in bytes, footer included."""
        end = self.spans[-1][1]
        return math.ceil(end / _ALIGNMENT) * _ALIGNMENT + _FOOTER_BYTES

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the packed tensor in its storage dtype."""
        return self.nbytes // self.format.storage.itemsize, 1

    @property
    def footer(self) -> bytes:
        """The last 32 bytes: a magic number, type, block size and shape."""
        format = self.format
        is_4bit = format.quant_type != "int8"
        fields = (TYPES.index(format.quant_type), is_4bit and format.double_quant, 0)
        packed = _FOOTER.pack(_MAGIC, *fields, format.block_size if is_4bit else 0, self.rows, self.columns)
        return packed.ljust(_FOOTER_BYTES, b"\0")

    def empty(self, device: torch.device | str) -> Tensor:
        """Returns packed weights (`shape`, in the storage dtype) with a footer and zeros otherwise."""
        packed = torch.zeros(self.nbytes, dtype=torch.uint8, device=device)
        if packed.device.type != "meta":
            packed[-_FOOTER_BYTES:] = torch.frombuffer(bytearray(self.footer), dtype=torch.uint8).to(packed.device)
        return packed.view(self.format.storage).view(self.shape)

    def parts(self, packed: Tensor) -> Parts:
        """Returns views of the parts of packed weights, in any storage dtype."""
        flat = packed.view(torch.uint8).view(-1)
        codes, scales, nested, offset = (flat[start:end] for start, end in self.spans)
        if self.format.quant_type == "int8":
            return Parts(codes.view(torch.int8).view(self.rows, self.columns), scales.view(torch.float32), None, None)
        if not self.format.double_quant:
            return Parts(codes, scales.view(torch.float32), None, None)
        return Parts(codes, scales, nested.view(torch.float32), offset.view(torch.float32))


def layout_of(packed: Tensor, storage: torch.dtype = torch.uint8) -> Layout | None:
    """Reads the layout from the footer of packed weights, None for other tensors; `storage` is not in the footer."""
    if packed.is_meta or not packed.is_contiguous() or packed.numel() * packed.itemsize < _FOOTER_BYTES:
        return None
    flat = packed.detach().reshape(-1).view(torch.uint8)
    layout = _read(bytes(flat[-_FOOTER_BYTES:].tolist()), storage)
    return layout if layout is not None and layout.nbytes == flat.numel() else None


def check_footer(part: Tensor, start: int, layout: Layout) -> str | None:
    """Returns how a shard of packed weights, bytes from `start` on, differs in its part of the footer from `layout`.

    None: there is no difference, or the footer is in another shard.
    """
    first = layout.nbytes - _FOOTER_BYTES
    found = bytes(part[max(first - start, 0) :].tolist()) if start + len(part) > first else b""
    offset = max(start - first, 0)
    if found == layout.footer[offset : offset + len(found)]:
        return None
    theirs = _read(found, layout.format.storage) if len(found) == _FOOTER_BYTES else None
    return "another format" if theirs is None else str(theirs.format)


def _read(footer: bytes, storage: torch.dtype) -> Layout | None:
    magic, type_index, double_quant, _, block_size, rows, columns = _FOOTER.unpack(footer[: _FOOTER.size])
    if magic != _MAGIC or type_index >= len(TYPES):
        return None
    layout = Layout(Format(TYPES[type_index], block_size or 64, bool(double_quant), storage), rows, columns)
    return layout if layout.footer == footer else None
