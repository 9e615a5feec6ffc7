"""Materialising: a model that was built on meta gets its values shard by shard, and the values it would have had whole.

Module by module, in the order of definition, every rank makes the module's parameters in full, has them initialised
under the same random numbers, keeps its shard, and frees the rest. So no rank ever holds more than one module in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from precision_core.casting import cast_tensor

InitFn = Callable[[nn.Module], Any]

_WAY_OUT = (
    "give their modules a reset_parameters() that sets them, pass FSDPStrategy(init_fn=...), or build the model "
    "outside of fabric.init_module()"
)


def is_on_meta(module: nn.Module) -> bool:
    """Whether some parameter or buffer has no values yet."""
    return any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def check_can_initialise(root: nn.Module, init_fn: InitFn | None) -> None:
    """Raises `ValueError` naming parameters and buffers on meta whose module has no way to set them."""
    if init_fn is not None:
        return
    names = [
        f"{name}.{key}" if name else key
        for name, module in root.named_modules()
        for key in _on_meta(module)
        if _reset_of(module) is None
    ]
    if names:
        raise ValueError(f"nothing initialises {_listed(names)}: {_WAY_OUT}")


@torch.no_grad()
def materialise(root: nn.Module, init_fn: InitFn | None, device: torch.device) -> None:
    """Gives what is on meta in the sharded `root` its values: `init_fn(module)`, else `module.reset_parameters()`.

    The random numbers are those of rank zero's generator on the CPU, where the values are drawn: what the same modules
    would get one after the other in one process.

    Raises:
        ValueError: parameters or buffers that nothing has set, by name.
    """
    holders: dict[int, list[tuple[nn.Module, str]]] = {}  # of each parameter on meta: a tied one has several
    work = []
    for name, module in root.named_modules():
        keys = _on_meta(module)
        for key in keys:
            if (param := module._parameters.get(key)) is not None:
                holders.setdefault(id(param), []).append((module, key))
        if keys:
            work.append((name, module, keys, {key: id(module._parameters.get(key)) for key in keys}))
    unset: list[str] = []
    kept = [*root.parameters()]  # else an id could be given to another tensor
    with _random_numbers_of_rank_zero():
        for name, module, keys, ids in work:
            sharded = {key: tensor for key in keys if (tensor := module._parameters.get(key)) is not None}
            _fill(module, keys)
            versions = {key: (_slot(module, key), _slot(module, key)._version) for key in keys}
            reset = _reset_of(module)
            if init_fn is not None:
                init_fn(module)
            elif reset is not None:
                reset()
            unset += [
                f"{name}.{key}" if name else key for key in keys if not _is_set(_slot(module, key), versions[key])
            ]
            for key in keys:
                value, (empty, _) = _slot(module, key), versions[key]
                if key not in sharded:
                    module._buffers[key] = cast_tensor(value.detach(), empty.dtype).to(device)
                    continue
                new = _shard(value, sharded[key], device)
                for holder, holder_key in holders[ids[key]]:
                    holder._parameters[holder_key] = new
    del kept
    if unset:
        raise ValueError(f"nothing initialises {_listed(unset)}: {_WAY_OUT}")


def _on_meta(module: nn.Module) -> list[str]:
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


def _slot(module: nn.Module, key: str) -> Tensor:
    tensor: Tensor | None = module._parameters.get(key)
    if tensor is None:
        tensor = module._buffers[key]
    assert tensor is not None
    return tensor


def _fill(module: nn.Module, keys: list[str]) -> None:
    """Puts tensors of the whole shape where those on meta are, with values that nobody would choose."""
    for key in keys:
        old = _slot(module, key)
        new = torch.empty(old.shape, dtype=old.dtype)
        if old.is_floating_point() or old.is_complex():
            new.fill_(float("nan"))
        else:
            new.zero_()
        if key in module._parameters:
            module._parameters[key] = nn.Parameter(new, requires_grad=old.requires_grad)
        else:
            module._buffers[key] = new


def _is_set(value: Tensor, before: tuple[Tensor, int]) -> bool:
    if value.is_meta:
        return False
    if value.is_floating_point() or value.is_complex():
        return not bool(torch.isnan(value).any())
    return value is not before[0] or value._version != before[1]


def _shard(value: Tensor, like: nn.Parameter, device: torch.device) -> nn.Parameter:
    """Returns this rank's shard of `value` as the parameter that takes the place of `like`."""
    if not isinstance(like, DTensor):
        return nn.Parameter(value.detach().to(device), requires_grad=like.requires_grad)
    whole = cast_tensor(value.detach(), like.dtype).to(device)
    shard = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)  # all ranks have the values
    return nn.Parameter(shard, requires_grad=like.requires_grad)


@contextmanager
def _random_numbers_of_rank_zero() -> Iterator[None]:
    """Draws what rank zero would; a rank whose generator differed from rank zero's has it back afterwards."""
    own = torch.get_rng_state()
    common = own.clone()
    dist.broadcast(common, src=0)
    torch.set_rng_state(common)
    try:
        yield
    finally:
        if not torch.equal(own, common):
            torch.set_rng_state(own)


def _listed(names: list[str], count: int = 10) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
