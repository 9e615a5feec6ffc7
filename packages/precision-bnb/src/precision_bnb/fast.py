"""The CPU's fused kernel for 4-bit weights in evaluation (AVX512-BF16), from a repacked copy of them.

bitsandbytes repacks a layer's own weights the first time that it evaluates; training, `state_dict`, dequantisation and
sharding are silently wrong from then on. Here the copy is beside the weights, and is dropped when the layer trains.
"""

from __future__ import annotations

from weakref import ref

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from precision_bnb.config import BitsAndBytesConfig
from precision_bnb.packed import Layout
from precision_bnb.quantizing import code_of, scales_of

_ROWS, _COLUMNS = 32, 64
"""The kernel takes multiples of these."""


def is_available() -> bool:
    """Whether this CPU has the kernel."""
    return bool(bnb.has_avx512bf16())


def check(config: BitsAndBytesConfig) -> None:
    """Raises `ValueError` where the kernel is asked for, and this CPU has none."""
    if config.fast_inference and not is_available():
        raise ValueError(
            "BitsAndBytesConfig(fast_inference=True) needs a CPU with AVX512-BF16, and this one has none: leave it out"
        )


def supports(layout: Layout) -> bool:
    """Whether this CPU has the kernel and it takes weights of that shape and type."""
    format = layout.format
    fits = layout.rows % _ROWS == 0 and layout.columns % _COLUMNS == 0 and layout.columns % format.block_size == 0
    return fits and format.quant_type != "int8" and is_available()


class Repacked:
    """A copy of packed weights in the kernel's layout: 4 bits a weight and bfloat16 scales."""

    def __init__(self, packed: Tensor, layout: Layout) -> None:
        self._of, self._state = ref(packed), _state(packed)
        parts, format = layout.parts(packed.detach()), layout.format
        state = bnb.QuantState(
            absmax=scales_of(layout, *parts[1:]),
            shape=torch.Size((layout.rows, layout.columns)),
            blocksize=format.block_size,
            quant_type=format.quant_type,
            dtype=torch.bfloat16,
        )
        self._codes, state = bnb._convert_weight_packed_for_cpu(parts.codes.clone().view(-1, 1), state)
        self._scales = state.absmax
        self._layout = layout

    def is_of(self, packed: Tensor) -> bool:
        """Whether this is a copy of that tensor's present values; writes through `.data` are not noticed."""
        return self._of() is packed and self._state == _state(packed)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Returns x W^T + bias for bfloat16 `x` (n, columns)."""
        layout = self._layout
        if not len(x):
            return x.new_zeros(0, layout.rows)  # the kernel divides by the rows
        code = code_of(layout.format.quant_type, x.device)
        kernel = torch.ops.bitsandbytes.gemv_4bit.default
        shape = (layout.rows, layout.columns)
        result: Tensor = kernel(x.contiguous(), self._codes, shape, self._scales, code, layout.format.block_size)
        return result if bias is None else result.add_(bias)


def _state(packed: Tensor) -> tuple[int, int]:
    return packed.data_ptr(), 0 if packed.is_inference() else packed._version  # which inference tensors do not have
