"""XLAPrecision: every mode of core as XLA devices run it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch.amp.grad_scaler import GradScaler

from precision_core import MixedPrecision, Policy
from precision_core.policy import stores_as_torch
from precision_core.precision import Wrapping, make_plugin
from precision_xla.attention import casts_attention
from precision_xla.environment import check_environment
from precision_xla.hardware import register
from precision_xla.support import NO_STORAGE

if TYPE_CHECKING:
    from precision_core import Strategy


class XLAPrecision(Wrapping):
    """Core's modes on an XLA device: `*-true` casts the module and its inputs, `*-mixed` is `torch.autocast("xla")`.

    Nothing is asked of torch_xla's environment variables (`XLA_USE_BF16` and its kin); those that would change the
    dtypes are refused.

    Args:
        precision: a mode, an alias, or a policy; exceptions are applied.
        scaler: for a policy that scales the loss, the `torch.amp.GradScaler("xla", ...)` to use, or a dict of its
            options.

    Raises:
        ValueError: an unknown mode, one that nothing runs, a scaler that does not match it, or an environment variable
            by which torch_xla would change the dtypes.
    """

    def __init__(
        self,
        precision: str | int | Policy = "32-true",
        *,
        scaler: GradScaler | Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        check_environment()
        register()
        self.policy = Policy.parse(precision)
        if scaler is not None and not self.policy.scale:
            raise ValueError(
                f"XLAPrecision({str(self.policy)!r}, scaler=...): this policy does not scale the loss; leave it out"
            )
        if self.policy.params.itemsize < 4 and not stores_as_torch(self.policy):
            raise ValueError(f"XLAPrecision({str(self.policy)!r}): {NO_STORAGE}")
        self.wrapped = make_plugin(self.policy, "xla") if scaler is None else MixedPrecision(self.policy, "xla", scaler)

    def refuses(self, strategy: Strategy) -> str | None:
        """Returns why not: another kind of device. What the hardware behind an XLA device lacks, the strategy knows."""
        if strategy.device.type != "xla":
            return (
                f'it runs on XLA devices: pass strategy="xla", or the mode as a string, precision="{self.policy}", '
                f"for {strategy.device.type}"
            )
        return None

    def forward_context(self) -> AbstractContextManager[Any]:
        """Context in which forward runs: `torch.autocast("xla")` in mixed modes, else created tensors get the dtype."""
        context = super().forward_context()
        if isinstance(context, torch.autocast) and not torch.compiler.is_compiling():  # torch 2.9 traces no such mode
            return casts_attention(context)
        return context

    def setup_scaler(self) -> GradScaler:
        """Returns torch's scaler in use; a disabled one where nothing is scaled."""
        if isinstance(self.wrapped, MixedPrecision):
            return self.wrapped.setup_scaler()
        return torch.amp.GradScaler("xla", enabled=False)
