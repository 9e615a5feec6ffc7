"""FSDPPrecision: every mode of core as FSDP runs it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.fsdp import MixedPrecision as FSDP1MixedPrecision
from torch.distributed.fsdp import MixedPrecisionPolicy

from precision_core import HalfPrecision, MixedPrecision, Policy, Precision
from precision_core.precision import Item, Report, Wrapping, make_plugin
from precision_fsdp.float32 import compute_in_float32, float32_statistics
from precision_fsdp.policies import casts_of

if TYPE_CHECKING:
    from precision_core import Strategy

T = TypeVar("T")


class FSDPPrecision(Wrapping):
    """Core's modes, with the parameters of mixed ones gathered in the compute dtype.

    True modes are core's. In mixed modes the shards, gradients and optimizer state are float32; FSDP gathers parameters
    in bfloat16 or float16, half the bytes, and forward runs under autocast. Norms, and all else but matrix
    products, compute in float32 with the gathered weights.

    Args:
        precision: a mode, an alias, or a policy; exceptions are applied in groups of their own.
        scaler: for a policy that scales the loss, the `torch.amp.GradScaler` to use, or a dict of its options.

    Raises:
        ValueError: an unknown mode, one that nothing runs, or a scaler that does not match it.
    """

    def __init__(
        self, precision: str | int | Policy = "32-true", scaler: GradScaler | Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        self.policy = Policy.parse(precision)
        self._given_scaler = scaler
        self._restores = ExitStack()
        if scaler is not None and not self.policy.scale:
            raise ValueError(
                f"FSDPPrecision({str(self.policy)!r}, scaler=...): this policy does not scale the loss; leave it out"
            )
        self._use_device(_device_type(scaler))

    def _use_device(self, device_type: str) -> None:
        self._device_type = device_type
        if self._given_scaler is not None:
            self.wrapped = self._with_scaler(device_type)
        else:
            self.wrapped = make_plugin(self.policy, device_type)

    def _with_scaler(self, device_type: str) -> Precision:
        given = self._given_scaler
        initial = given.get("init_scale", 1.0) if isinstance(given, Mapping) else 1.0
        if isinstance(initial, (int, float)) and not (0 < initial < float("inf")):
            raise ValueError(f"FSDPPrecision(scaler={given}): init_scale must be positive and finite")
        try:
            if self.policy.mixed:
                return MixedPrecision(self.policy, device=device_type, scaler=given)
            return HalfPrecision(self.policy, scaler=given)
        except ValueError as error:  # which names core's class, not the user's call
            text = str(error).replace('device="cpu", ', "")
            for name in ("MixedPrecision(", "HalfPrecision("):
                text = text.replace(name, "FSDPPrecision(")
            raise ValueError(text) from error

    # ---------------------------------------------------------------- for FSDP

    def setup_mixed_precision_config(self) -> FSDP1MixedPrecision | None:
        """Returns FSDP1's `MixedPrecision`; None where nothing is narrower than the parameters: 32-true, 64-true."""
        casts = casts_of(self.policy)
        kept = {casts.param_dtype, casts.reduce_dtype, casts.buffer_dtype, self.policy.params}
        return None if kept in ({torch.float32}, {torch.float64}) else casts.for_fsdp1()

    def setup_mixed_precision_policy(self, *, root: bool = False) -> MixedPrecisionPolicy:
        """Returns FSDP2's policy for `fully_shard(block, mp_policy=...)`.

        Without an output dtype, since the blocks of a model must match each other; `root` adds it for the outermost
        module, where `convert_output` is not called.
        """
        return casts_of(self.policy).for_fsdp2(root)

    # ---------------------------------------------------------------- as core's plugin of the mode

    def refuses(self, strategy: Strategy) -> str | None:
        """Returns why not, when the strategy's device lacks a dtype or is not the scaler's."""
        if self._given_scaler is not None and strategy.device.type != self._device_type:
            return f"its scaler is for {self._device_type!r}: pass torch.amp.GradScaler({strategy.device.type!r}, ...)"
        is_wide = self.policy.grads is not self.policy.params  # which core's plugin of the mode looks at
        return super().refuses(strategy) or (self.wrapped.refuses(strategy) if is_wide else None)

    def connect(self, strategy: Strategy) -> None:
        """Takes the device, and the policy as the strategy may have changed it."""
        if (strategy.device.type, self.policy) != (self._device_type, self.wrapped.policy):
            self._use_device(strategy.device.type)
        super().connect(strategy)

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Converts as core's plugin of the mode does; in mixed modes all but matrix products will run in float32."""
        if not self.policy.mixed:
            return super().convert_module(module)
        with float32_statistics(module, self.policy) as kept:
            module = super().convert_module(module)
        self.report = _with_kept(self.report, kept)
        for restore in compute_in_float32(module, self.policy):
            self._restores.callback(restore)
        return module

    def teardown(self) -> None:
        """Gives modules their own forward back."""
        self._restores.close()
        super().teardown()


def _with_kept(report: Report, names: list[str]) -> Report:
    kept = tuple(Item(name, "kept in float32: torch's batch norm wants weight and statistics alike") for name in names)
    converted = tuple(item for item in report.converted if item.name not in names)
    return replace(report, converted=converted, skipped=(*report.skipped, *kept))


def _device_type(scaler: GradScaler | Mapping[str, float] | None) -> str:
    """Returns the scaler's device, else torch's current accelerator, else the CPU."""
    if isinstance(scaler, GradScaler):
        return torch.device(scaler._device).type
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else accelerator.type
