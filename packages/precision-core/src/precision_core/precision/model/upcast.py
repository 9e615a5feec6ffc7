"""Upcast: casts trainable half parameters, from a half checkpoint, to float32, which mixed modes train."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from precision_core.policy.dtypes import FLOAT_DTYPES
from precision_core.policy.policy import Policy
from precision_core.precision.model.cast_module import cast_parameters
from precision_core.precision.model.regions import EffectivePolicies
from precision_core.precision.model.report import Item


def check_upcast(policy: Policy, mode: str) -> None:
    """Raises `ValueError` for a policy that is not mixed: true modes cast all parameters to their own dtype."""
    if not policy.mixed:
        raise ValueError(
            f'Fabric(precision="{mode}", upcast=True): {mode} casts all parameters to its own dtype; upcast is for '
            "mixed modes, which keep float32 parameters: leave it out"
        )


def upcast(module: nn.Module, policy: Policy, storage: Callable[[nn.Parameter], torch.dtype | None]) -> list[Item]:
    """Casts trainable parameters to float32, in place, and returns what was cast.

    Frozen vectors of the same module are cast too, for a norm whose weight trains and whose bias does not. Parameters
    of modules that are exceptions to `policy`, and those for which `storage` returns None, stay.
    """
    policies = EffectivePolicies(module, policy)
    trained = {name.rpartition(".")[0] for name, param in module.named_parameters() if param.requires_grad}

    def dtype(name: str, param: nn.Parameter) -> torch.dtype | None:
        is_wrong = param.dtype in FLOAT_DTYPES and policies.of(name).params is torch.float32 is not param.dtype
        beside = param.dim() < 2 and name.rpartition(".")[0] in trained
        ours = is_wrong and (param.requires_grad or beside) and storage(param) is not None
        return torch.float32 if ours else None

    return cast_parameters(module, dtype)
