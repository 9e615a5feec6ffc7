"""Start: all ranks begin with rank zero's parameters and buffers, on their devices."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def send(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Moves tensors to the device in place, and broadcasts rank zero's values; those on meta are left out."""
    for tensor in tensors:
        if tensor.is_meta or not tensor.numel():
            continue
        tensor.data = tensor.data.to(device)
        if dist.get_world_size() > 1:
            values = _unexpanded(tensor.data)
            sent = values.contiguous()
            dist.broadcast(sent.flatten().view(torch.uint8), src=0)  # as bytes: gloo does not take every dtype
            if sent.data_ptr() != values.data_ptr():
                values.copy_(sent)


def _unexpanded(tensor: Tensor) -> Tensor:
    """Returns an expanded tensor before `expand`, of size 1 where the stride is 0; else `tensor` itself."""
    if 0 not in tensor.stride():
        return tensor
    shape = [size if stride else 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return tensor.as_strided(shape, [stride or 1 for stride in tensor.stride()])
