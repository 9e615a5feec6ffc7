"""Mixed precision: float32 parameters, matrix products in bfloat16 or float16 by torch's autocast."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from precision_core.hardware import is_available
from precision_core.policy.dtypes import FLOAT_DTYPES, HALF_DTYPES, dtype_name
from precision_core.policy.messages import listed
from precision_core.policy.policy import Policy
from precision_core.precision.base import Precision
from precision_core.precision.model.cast_module import cast_buffers, cast_parameters
from precision_core.precision.model.regions import EffectivePolicies, apply_exceptions
from precision_core.precision.model.report import Item, module_bytes
from precision_core.precision.model.upcast import upcast
from precision_core.precision.range import check_complex
from precision_core.precision.runnable import check_runnable
from precision_core.precision.torch_scaler import check_scaler
from precision_core.scaling.scaler import Scaler

if TYPE_CHECKING:
    from precision_core.strategies.base import Strategy

T = TypeVar("T")


class MixedPrecision(Precision):
    """`16-mixed` or `bf16-mixed`: forward runs under autocast, inputs are kept, outputs come back in float32.

    Args:
        precision: the mode, or a policy with float32 params and bfloat16 or float16 compute; exceptions are applied.
        device: the device type that autocast and the scaler work on.
        scaler: for float16, the `torch.amp.GradScaler` to use, or a dict of its `init_scale`, `growth_factor`,
            `backoff_factor`, `growth_interval`; None makes torch's default one when it is needed.
        upcast: cast trainable parameters that are not float32 to float32, instead of refusing them, and frozen vectors
            beside them, for a norm whose weight trains and whose bias does not.
        min_scale: the loss scale does not fall below this. Default 2**-14, float16's smallest normal number: below it
            gradients lose the bits that scaling is to keep.
        max_skips: raise `FloatingPointError` after this many consecutive skipped steps. Default 50: from 2**16 down to
            `min_scale` are 30 halvings, and a step that still overflows then needs more than a lower scale.

    Raises:
        ValueError: another mode, a scaler for bfloat16, a scaler that torch has disabled or that is for another device.
    """

    def __init__(
        self,
        precision: str | int | Policy = "16-mixed",
        device: str | torch.device = "cuda",
        scaler: GradScaler | Mapping[str, float] | None = None,
        *,
        upcast: bool = False,
        min_scale: float = 2.0**-14,
        max_skips: int = 50,
    ) -> None:
        super().__init__(policy=precision)
        try:
            self.device_type = torch.device(device).type
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"MixedPrecision(device={device!r}): expected a device type such as 'cuda'") from error
        self._device_is_here = is_available(self.device_type)  # asked in forward, where torch.compile traces
        self._given_scaler = check_scaler(scaler, self.policy, self.device_type)
        self._upcast = upcast
        self._min_scale = min_scale
        self._max_skips = max_skips

    def check_policy(self, policy: Policy) -> Policy:
        check_runnable(policy)
        name = f"MixedPrecision({str(policy)!r})"
        if not policy.mixed:
            raise ValueError(f"{name}: params and compute are alike; this plugin runs 16-mixed and bf16-mixed")
        for pattern, exception in policy.exceptions:
            if policy.scale and exception.params is torch.float16:
                raise ValueError(
                    f"{name}: {pattern} would have float16 parameters under a scaled loss, whose gradients torch does "
                    f"not unscale; say {pattern}: 16-mixed or {pattern}: 32-true"
                )
        return policy

    # ---------------------------------------------------------------- set-up

    def refuses(self, strategy: Strategy) -> str | None:
        """Returns why not, when the strategy's device is not the plugin's, or lacks the dtype."""
        device_type = strategy.device.type
        if device_type != self.device_type:
            return (
                f"it was made for {self.device_type!r}: pass "
                f'MixedPrecision({str(self.policy)!r}, device="{device_type}"), or the mode as a string'
            )
        return super().refuses(strategy)

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Checks that trainable parameters are float32, applies the exceptions, and returns `module`.

        Frozen parameters in another dtype stay as they are, and are named in the report.

        Raises:
            ValueError: trainable parameters in another dtype, unless `upcast`; complex ones under a scaled loss.
        """
        check_complex(module, self.policy)
        before = module_bytes(module)
        items = upcast(module, self.policy, self.storage) if self._upcast else []
        policies = EffectivePolicies(module, self.policy)
        wrong = [
            (name, param)
            for name, param in module.named_parameters()
            if param.dtype in FLOAT_DTYPES and policies.of(name).params is torch.float32 is not param.dtype
        ]
        self._check_trainable([(name, param) for name, param in wrong if param.requires_grad])
        frozen = {name for name, param in wrong if not param.requires_grad}
        items += cast_parameters(
            module,
            lambda name, param: None if name in frozen or self.storage(param) is None else policies.of(name).params,
        )
        items += cast_buffers(module, lambda name, buffer: _buffer_dtype(policies.of(name).buffers, buffer))[0]
        for restore in apply_exceptions(module, policies, self.device_type):
            self._restores.callback(restore)
        skipped = [Item(name, f"frozen, stays {dtype_name(param.dtype)}") for name, param in wrong if name in frozen]
        return self._converted(module, before, items, skipped)

    def _check_trainable(self, wrong: list[tuple[str, nn.Parameter]]) -> None:
        if wrong and not self._upcast:
            names = listed(f"{name} ({dtype_name(param.dtype)})" for name, param in wrong)
            raise ValueError(
                f"{self.policy.flat} trains float32 parameters, these are not: {names}. To cast them to float32 "
                f'pass Fabric(precision="{self.policy}", upcast=True), or without Fabric MixedPrecision('
                f'"{self.policy}", device="{self.device_type}", upcast=True); or load the model in float32 '
                "(transformers: dtype=torch.float32), or freeze them with requires_grad_(False) [half-parameters]"
            )

    # ---------------------------------------------------------------- forward

    def convert_input(self, data: T) -> T:
        """Returns `data` as it is: targets, masks and timestamps keep their values, autocast casts what it needs."""
        return data

    def forward_context(self) -> AbstractContextManager[Any]:
        """A new autocast context for the plugin's device and compute dtype."""
        if not self._device_is_here:
            raise self._missing_device()
        return torch.autocast(self.device_type, dtype=self.policy.compute)

    def _missing_device(self) -> ValueError:
        return ValueError(
            f"MixedPrecision(device={self.device_type!r}): there is no such device here, and autocast would do "
            'nothing; pass device="cpu" or another that torch finds'
        )

    # ---------------------------------------------------------------- scaling

    def setup_scaler(self) -> GradScaler:
        """Returns the torch scaler in use: the one given, else one made now; a disabled one where nothing is scaled.

        Raises:
            ValueError: the device is missing.
        """
        return self._torch_scaler

    @cached_property
    def _torch_scaler(self) -> GradScaler:
        if not self.policy.scale:
            return GradScaler(self.device_type, enabled=False)
        if isinstance(self._given_scaler, GradScaler):
            return self._given_scaler
        if not self._device_is_here:
            raise self._missing_device()
        return GradScaler(self.device_type, **self._given_scaler)  # type: ignore[arg-type]

    @cached_property
    def scaler(self) -> Scaler:
        """The loss scaler; one that does nothing where the loss is not scaled."""
        if not self.policy.scale:
            return Scaler()
        from precision_core.scaling.loss_scaler import LossScaler  # most modes do not scale

        by_exception = {exception.params for _, exception in self.policy.exceptions}
        # Reading a value waits for any device but the CPU.
        return LossScaler(
            self.setup_scaler(),
            min_scale=self._min_scale,
            max_skips=self._max_skips,
            avoid_sync=self.device_type != "cpu",
            models=self.models,
            refused={torch.float16, torch.bfloat16} - by_exception,
            name_of=self.name_of,
        )


def _buffer_dtype(dtype: torch.dtype, buffer: Tensor) -> torch.dtype | None:
    """Returns what a buffer is cast to: under float32 a half one stays, since nothing is won by widening it."""
    return None if dtype is torch.float32 and buffer.dtype in HALF_DTYPES else dtype
