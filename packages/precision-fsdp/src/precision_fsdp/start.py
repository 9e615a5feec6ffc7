"""Start: all ranks begin with rank zero's parameters and buffers, on their devices.

Ranks mostly have the same values, by the same seed or the same file. So they compare what their values come to, 16
bytes a tensor, and rank zero sends those alone that differ somewhere.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from precision_fsdp.fake import is_fake

_CHUNK = 2**22
"""Words of 8 bytes that are hashed at a time: their copies are freed before the next ones."""


def send(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Moves tensors to the device in place, and broadcasts rank zero's values of those that are not alike on all ranks.

    Those on meta are left out; fake ones have no values to send.
    """
    moved = [tensor for tensor in tensors if not tensor.is_meta and tensor.numel()]
    for tensor in moved:
        tensor.data = tensor.detach().to(device)  # packed weights show less of themselves as `data`
    if dist.get_world_size() == 1 or not moved or is_fake(moved[0]):
        return
    values = [_unexpanded(tensor.detach()) for tensor in moved]
    for each, differs in zip(values, _differing([_bytes(each) for each in values]), strict=True):
        if differs:
            sent = each.contiguous()
            dist.broadcast(_bytes(sent), src=0)
            if sent.data_ptr() != each.data_ptr():
                each.copy_(sent)


def _differing(tensors: list[Tensor]) -> list[bool]:
    """Returns for each tensor of bytes whether some rank has others, on all ranks the same answers."""
    mine = torch.stack([_hash(each) for each in tensors])
    everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, mine)
    differs: list[bool] = (torch.stack(everyones) != mine).any(2).any(0).tolist()
    return differs


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)  # gloo does not take every dtype


_GOLDEN, _ONE, _TWO = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def _hash(content: Tensor) -> Tensor:
    """Returns 16 bytes, as int64 (2,), by which contents of bytes differ, where they lie."""
    has_memory = type(content) is Tensor and content.device.type == "cpu"  # subclasses may have none of their own
    return _hash_of_cpu(content) if has_memory else _hash_on_device(content)


def _hash_of_cpu(content: Tensor) -> Tensor:
    view = (ctypes.c_char * len(content)).from_address(content.data_ptr())
    digest = hashlib.sha256(view, usedforsecurity=False).digest()  # 1.2 GB/s, 30 times as fast as torch's sums
    return torch.tensor([int.from_bytes(digest[at : at + 8], "little", signed=True) for at in (0, 8)])


def _hash_on_device(content: Tensor) -> Tensor:
    """Sums over the words, each mixed with its index, by which no device's host waits.

    The mixing is that of splitmix64 (Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators, 2014).
    """
    whole = len(content) // 8 * 8
    rest = content[whole:].to(torch.int64)
    head = content[:whole]
    words = head.view(torch.int64) if head.storage_offset() % 8 == 0 else head.clone().view(torch.int64)
    total = torch.zeros(2, dtype=torch.int64, device=content.device)
    for start in range(0, len(words), _CHUNK):
        total += _mixed(words[start : start + _CHUNK], start)
    return total + _mixed(rest, len(words))


def _mixed(words: Tensor, start: int) -> Tensor:
    index = torch.arange(start + 1, start + len(words) + 1, device=words.device)
    x = words + index * _GOLDEN
    for shift, factor in ((30, _ONE), (27, _TWO)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    return torch.stack([x.sum(), (x ^ ((x >> 31) & (2**33 - 1))).mul(index).sum()])


def _unexpanded(tensor: Tensor) -> Tensor:
    """Returns an expanded tensor before `expand`, of size 1 where the stride is 0; else `tensor` itself."""
    if 0 not in tensor.stride():
        return tensor
    shape = [size if stride else 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return tensor.as_strided(shape, [stride or 1 for stride in tensor.stride()])
