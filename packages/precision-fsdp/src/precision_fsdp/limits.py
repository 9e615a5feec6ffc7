"""Limits: what FSDP cannot shard is refused by name before anything is sharded, not by torch half-way."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from precision_core.policy import listed

_LIMITS: tuple[tuple[Callable[[nn.Parameter], bool], str], ...] = (
    (
        lambda param: param.ndim == 0,
        "FSDP cannot shard 0-dimensional parameters: {}. Give them a dimension: nn.Parameter(x.reshape(1))",
    ),
    (
        lambda param: param.is_complex(),
        "FSDP cannot gather and reduce complex parameters: {}. Hold them as nn.Parameter(torch.view_as_real(x)) and "
        "call torch.view_as_complex on it in forward; what does not train can be a buffer",
    ),
)


def check_can_shard(root: nn.Module, mesh: DeviceMesh) -> None:
    """Raises `ValueError` naming parameters and modules that FSDP cannot shard."""
    for is_beyond, reason in _LIMITS:
        names = [name for name, param in root.named_parameters() if is_beyond(param)]
        if names:
            raise ValueError(reason.format(listed(names)))
    tables = (nn.Embedding, nn.EmbeddingBag)
    names = [name for name, module in root.named_modules() if isinstance(module, tables) and module.sparse]
    if names:
        raise ValueError(f"FSDP cannot reduce sparse gradients: {listed(names)} has sparse=True; leave it out")
    _check_integers(root, mesh)


def _check_integers(root: nn.Module, mesh: DeviceMesh) -> None:
    """Raises `ValueError` naming integer parameters, such as packed weights, where torch cannot shard them (2.9)."""
    params = root.named_parameters()
    names = [name for name, param in params if not (param.is_floating_point() or param.is_complex())]
    if not names:
        return
    probe = nn.Module()
    probe.register_parameter("weight", nn.Parameter(torch.zeros(1, dtype=torch.uint8), requires_grad=False))
    try:
        fully_shard(probe.to(mesh.device_type), mesh=mesh)
    except RuntimeError as error:
        raise ValueError(
            f"torch {torch.__version__} cannot shard parameters of integers: {listed(names, 5)}. Use a newer "
            'torch, or store packed weights in a float dtype (bitsandbytes: bnb_4bit_quant_storage="bfloat16")'
        ) from error
