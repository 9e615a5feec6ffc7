"""Materialising: a model that was built on meta gets its values shard by shard, the same as without sharding.

Module by module, children before the one that holds them, as constructors do it, every rank makes the parameters in
full, has them initialised under the same random numbers, keeps its shard, and frees the rest. So no rank ever holds
more than one module in full; except that what is in a module with a `reset_parameters()` of its own stays in full until
that has been called, since it may set its children's parameters, too (torch's MultiheadAttention does). Only the shard
is moved to where it stays.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from precision_core.checkpoint import cut
from precision_core.policy import cast_tensor, listed

InitFn = Callable[[nn.Module], Any]

_WAY_OUT = (
    "give their modules a reset_parameters() that sets them, pass FSDPStrategy(init_fn=...), or build the model "
    "outside of fabric.init_module()"
)


def is_on_meta(module: nn.Module) -> bool:
    """Whether some parameter or buffer has no values yet."""
    return any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def check_can_initialise(root: nn.Module, init_fn: InitFn | None, empty: Container[nn.Module] = ()) -> None:
    """Raises `ValueError` naming parameters and buffers on meta that no module around them has a way to set.

    Modules in `empty` get theirs from a file, all but what no file has: buffers that are not persistent.
    """
    if init_fn is not None or not is_on_meta(root):
        return
    resets = {name for name, module in root.named_modules() if does_reset(module)}
    names = [
        f"{name}.{key}" if name else key
        for name, module in root.named_modules()
        for key in (not_in_files(module) if module in empty else keys_on_meta(module))
        if not any(name == other or not other or name.startswith(f"{other}.") for other in resets)
    ]
    if names:
        raise ValueError(f"nothing initialises {listed(names)}: {_WAY_OUT}")


@torch.no_grad()
def materialise(
    root: nn.Module,
    init_fn: InitFn | None,
    device: torch.device,
    *,
    offload: bool = False,
) -> None:
    """Gives what is on meta in the sharded `root` its values: `init_fn(module)`, else `module.reset_parameters()`.

    The random numbers are those of rank zero's generator on the CPU, where the values are drawn: what the same modules
    would get one after the other in one process. A tied parameter has the values of the first module that holds it.
    Buffers are on `device`, and shards, unless `offload` leaves them on the CPU.

    Raises:
        ValueError: parameters or buffers that nothing has set, by name.
    """
    if not is_on_meta(root):
        return
    walk = _Walk(root, init_fn, device, torch.device("cpu") if offload else device)
    with _random_numbers_of_rank_zero(device):
        walk.visit("", root, inside=False)
    if walk.unset:
        raise ValueError(f"nothing initialises {listed(walk.unset)}: {_WAY_OUT}")


class _Slot(NamedTuple):
    """A parameter or buffer that is there in full."""

    module: nn.Module
    key: str
    name: str
    like: Tensor
    """What was on meta."""
    empty: Tensor
    version: int


class _Walk:
    """One pass over the modules of `root`; what is `pending` is in full and no shard yet."""

    def __init__(self, root: nn.Module, init_fn: InitFn | None, device: torch.device, shards: torch.device) -> None:
        self._init_fn, self._device, self._shards = init_fn, device, shards
        self._keys = {module: keys_on_meta(module) for module in root.modules()}
        self._resets = {module for module in self._keys if init_fn is None and does_reset(module)}
        self._holders: dict[Tensor, list[tuple[nn.Module, str]]] = {}  # of each parameter on meta: a tied one's several
        for module, keys in self._keys.items():
            for key in keys:
                if key in module._parameters:
                    self._holders.setdefault(tensor_of(module, key), []).append((module, key))
        self._pending: list[_Slot] = []
        self.unset: list[str] = []

    def visit(self, name: str, module: nn.Module, inside: bool) -> None:
        """Initialises what is in `module`, then itself; `inside` one that resets its children, it all stays in full."""
        if module not in self._keys:
            return  # shared, and done
        keys, resets = self._keys.pop(module), module in self._resets
        for key, child in module.named_children():
            self.visit(f"{name}.{key}" if name else key, child, inside or resets)
        kept = {key: each for key, each in module._parameters.items() if keys and each is not None and not each.is_meta}
        for key in {**dict.fromkeys(keys), **kept}:
            self._fill(name, module, key, is_kept=key in kept)
        if resets:
            _reset_of(module)()  # type: ignore[misc]
        elif self._init_fn is not None and keys:
            self._init_fn(module)
        module._parameters.update(kept)  # tied, or given; their numbers were drawn nevertheless, as in a constructor
        if not inside:
            self._shard_pending()

    def _fill(self, name: str, module: nn.Module, key: str, is_kept: bool) -> None:
        """Replaces a tensor on meta by one of the full shape, filled with NaN (zeros where it has no NaN)."""
        like = tensor_of(module, key)
        new = torch.empty(like.shape, dtype=like.dtype)
        new.fill_(unset_value(like))
        if key not in module._parameters:
            module._buffers[key] = new
        else:
            new = nn.Parameter(new, requires_grad=like.requires_grad)
            for holder, holder_key in [(module, key)] if is_kept else self._holders[like]:
                holder._parameters[holder_key] = new
        if not is_kept:
            self._pending.append(_Slot(module, key, f"{name}.{key}" if name else key, like, new, new._version))

    def _shard_pending(self) -> None:
        for slot in self._pending:
            value = tensor_of(slot.module, slot.key)
            if not _is_set(value, (slot.empty, slot.version)):
                self.unset.append(slot.name)
            if slot.like not in self._holders:
                slot.module._buffers[slot.key] = cast_tensor(value.detach(), slot.like.dtype).to(self._device)
                continue
            new = _shard(value, slot.like, self._shards)
            for holder, key in self._holders[slot.like]:
                holder._parameters[key] = new
        self._pending.clear()


def does_reset(module: nn.Module) -> bool:
    """Whether its `reset_parameters()` is to be called: it must not undo values that parameters in it have already."""
    params = [*module.parameters()]
    on_meta = bool(keys_on_meta(module)) or (bool(params) and all(param.is_meta for param in params))
    return on_meta and _reset_of(module) is not None


def not_in_files(module: nn.Module) -> list[str]:
    """Returns the buffers of a module on meta that no file has."""
    return [key for key in keys_on_meta(module) if key in module._non_persistent_buffers_set]


def unset_value(like: Tensor) -> float:
    return float("nan") if like.is_floating_point() or like.is_complex() else 0


def keys_on_meta(module: nn.Module) -> list[str]:
    return [
        key
        for key, each in (*module._parameters.items(), *module._buffers.items())
        if each is not None and each.is_meta
    ]


def _reset_of(module: nn.Module) -> Callable[[], Any] | None:
    """Returns the method by which torch's modules initialise themselves; some have it as a private one."""
    for name in ("reset_parameters", "_reset_parameters"):
        if callable(method := getattr(module, name, None)):
            return method
    return None


def tensor_of(module: nn.Module, key: str) -> Tensor:
    tensor: Tensor | None = module._parameters.get(key)
    if tensor is None:
        tensor = module._buffers[key]
    assert tensor is not None
    return tensor


def _is_set(value: Tensor, before: tuple[Tensor, int]) -> bool:
    if value.is_meta:
        return False
    if value.is_floating_point() or value.is_complex():
        return not bool(torch.isnan(value).any())
    return value is not before[0] or value._version != before[1]


def _shard(value: Tensor, like: Tensor, device: torch.device) -> nn.Parameter:
    """Returns this rank's shard of `value`, the only part that is moved, as the parameter that replaces `like`."""
    if not isinstance(like, DTensor):
        return nn.Parameter(value.detach().to(device), requires_grad=like.requires_grad)
    shard = cut(cast_tensor(value.detach(), like.dtype), like).to(device)  # all ranks have the values
    return nn.Parameter(shard, requires_grad=like.requires_grad)


@contextmanager
def _random_numbers_of_rank_zero(device: torch.device) -> Iterator[None]:
    """Draws what rank zero would; a rank whose generator differed from rank zero's has it back afterwards.

    The state goes through `device`: a group of nccl alone sends no tensors of the CPU.
    """
    own = torch.get_rng_state()
    sent = own.to(device, copy=True)
    dist.broadcast(sent, src=0)
    common = sent.cpu()
    torch.set_rng_state(common)
    try:
        yield
    finally:
        if not torch.equal(own, common):
            torch.set_rng_state(own)
