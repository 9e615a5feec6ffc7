"""Views of a packed weight's parts, kept from one forward to the next: making them is half of a layer's own Python."""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn

from precision_bnb.packed import NESTED_BLOCK, Layout
from precision_bnb.quantizing import code_of, nested_code


class Views:
    """The parts of one packed weight, and bitsandbytes' description of it where it has 4 bits.

    Nothing here is computed from values: what is written to the weight is seen, so that its version does not matter.
    """

    def __init__(self, packed: Tensor, layout: Layout) -> None:
        self.layout = layout
        self.parts = layout.parts(packed.detach())
        self._dtype, self._shape = packed.dtype, packed.shape
        self._state: tuple[Tensor, Any] | None = None

    def are_of(self, packed: Tensor) -> bool:
        """Whether these show the memory of `packed`; False for what is no plain parameter, a shard for example.

        FSDP frees the memory of a gathered weight and may take other memory for the next one. The views of freed memory
        have no address.
        """
        if not issubclass(type(packed), nn.Parameter):
            return False
        with torch._C.DisableTorchFunctionSubclass():
            return (
                self.parts.codes.data_ptr() == packed.data_ptr()
                and packed.dtype is self._dtype
                and packed.shape == self._shape
            )

    def state(self, dtype: torch.dtype) -> tuple[Tensor, Any]:
        """Returns codes as bitsandbytes' 4-bit calls take them, and its `QuantState` for inputs of that dtype."""
        if self._state is None or self._state[1].dtype is not dtype:
            self._state = self.parts.codes.view(-1, 1), self._make_state(dtype)
        return self._state

    def _make_state(self, dtype: torch.dtype) -> Any:
        parts, layout, format = self.parts, self.layout, self.layout.format
        nested = offset = None
        if parts.nested is not None and parts.offset is not None:
            code = nested_code(parts.codes.device)
            nested = bnb.QuantState(absmax=parts.nested, code=code, blocksize=NESTED_BLOCK, dtype=torch.float32)
            offset = parts.offset.view(())
        return bnb.QuantState(
            absmax=parts.scales,
            shape=torch.Size((layout.rows, layout.columns)),
            code=code_of(format.quant_type, parts.codes.device),
            blocksize=format.block_size,
            quant_type=format.quant_type,
            dtype=dtype,
            offset=offset,
            state2=nested,
        )
