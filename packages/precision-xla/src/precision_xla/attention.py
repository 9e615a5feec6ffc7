"""Attention under `torch.autocast("xla")`: torch_xla's list of casts leaves out the one that CUDA's and the CPU's have.

Without it a model that rotates queries and keys in float32 (Llama) fails, as its values come from a cast product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


class _CastsAttention(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and torch.is_autocast_enabled("xla"):
            dtype = torch.get_autocast_dtype("xla")
            args = tuple(_cast(value, dtype) for value in args)
            kwargs = {name: _cast(value, dtype) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Returns a floating XLA tensor in `dtype`, anything else as it is: float64 too, as autocast leaves it."""
    casts = isinstance(value, Tensor) and value.device.type == "xla" and value.is_floating_point()
    return value.to(dtype) if casts and value.dtype is not torch.float64 else value


@contextmanager
def casts_attention(autocast: torch.autocast) -> Iterator[None]:
    """Context of `autocast` in which `scaled_dot_product_attention` is among what it casts."""
    with autocast, _CastsAttention():
        yield
