"""The plugin that is native to DeepSpeed: a mode as the engine runs it, and the casts that the engine leaves out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from precision_core import MODES, HalfPrecision, Policy, Precision
from precision_core.hardware import is_available
from precision_core.precision import Wrapping, make_plugin
from precision_deepspeed.config import has_pure_state
from precision_deepspeed.scaler import DynamicScaler, EngineScaler, SectionScaler
from precision_deepspeed.support import NO_FLOAT16, NO_FLOAT64, REDUCES_IN_FLOAT32
from precision_deepspeed.vendor import supports_float16

if TYPE_CHECKING:
    from precision_core import Strategy

_HALF = (torch.float16, torch.bfloat16)

# Named as users know it, for its warnings. The engine casts all parameters alike, and leaves buffers as they are.
_Half = type("DeepSpeedPrecision", (HalfPrecision,), {"_keeps_params": False})


class DeepSpeedPrecision(Wrapping):
    """A mode under a DeepSpeed engine; `policy` has the dtypes that the engine uses for it.

    Mixed modes are DeepSpeed's `torch_autocast` over float32 parameters. `bf16-true` and `16-true` are its sections
    `bf16` and `fp16`, which keep float32 master weights and optimizer state beside the half parameters
    (`policy.master`), and scale float16 losses.

    Args:
        precision: 32-true, 16-true, bf16-true, 16-mixed, bf16-mixed, an alias, or a policy without exceptions.
        amp_type: "native". "apex" raises: DeepSpeed 0.19.8, the oldest that this package supports, has no apex.
        amp_level: apex's; None.
        buffers: for true modes, as `HalfPrecision` takes it: which buffers to keep in float32.
        scaler: for `16-mixed`, `init_scale`, `growth_factor`, `backoff_factor`, `growth_interval`, `min_scale`. The
            scale of `16-true` is set in the config's `fp16` section.

    Raises:
        ValueError: float64, a policy that the engine cannot run, float16 parameters on an accelerator without float16.
    """

    def __init__(
        self,
        precision: str | int | Policy = "16-mixed",
        amp_type: str = "native",
        amp_level: str | None = None,
        *,
        buffers: str | torch.dtype | Iterable[str] | None = None,
        scaler: Mapping[str, Any] | None = None,
    ) -> None:
        _check_amp(amp_type, amp_level)
        asked = Policy.parse(precision)
        super().__init__(policy=asked)
        stored: dict[str, Any] = {"master": None, "state": asked.params, "grads": asked.params}
        self._core_policy = replace(asked, scale=asked.scale and asked.mixed, **stored)
        self._mode = str(asked) if asked in MODES.values() else str(self._core_policy)
        self._buffers = buffers
        self._scaler_options = dict(scaler or {})
        if scaler is not None and not (self.policy.mixed and self.policy.scale):
            raise ValueError(
                f"DeepSpeedPrecision({self._mode!r}, scaler=...): only 16-mixed takes it. The scale of 16-true is "
                'set in the config: {"fp16": {"initial_scale_power": 16, "loss_scale_window": 1000, ...}}'
            )
        if self.policy.params in _HALF:
            self.policy = replace(self.policy, buffers=self._make_half().policy.buffers)
        elif buffers is not None:
            raise ValueError(f"DeepSpeedPrecision({self._mode!r}, buffers=...): only true half modes cast buffers")
        self._device_type = "cuda" if is_available("cuda") else "cpu"
        self.wrapped = self._make_wrapped()

    def _make_half(self) -> Precision:
        return _Half(self._core_policy, buffers=self._buffers)

    def check_policy(self, policy: Policy) -> Policy:
        name = f"DeepSpeedPrecision({str(policy)!r})"
        if policy.exceptions:
            raise ValueError(f"{name}: the engine has one dtype for all layers, so exceptions are not supported")
        if torch.float64 in (policy.params, policy.compute, policy.reduce):
            raise ValueError(f"{name}: {NO_FLOAT64}")
        if policy.mixed:
            return _check_mixed(name, policy)
        if policy.params not in _HALF:
            if policy.scale or policy.reduce is not policy.params:
                raise ValueError(f"{name}: float32 throughout needs scale=false and reduce=float32")
            return policy
        _check_stored(name, policy)
        is_float16 = policy.params is torch.float16
        if policy.scale and not is_float16:
            raise ValueError(f"{name}: DeepSpeed does not scale bfloat16 losses; pass scale=false")
        if is_float16 and not supports_float16():
            raise ValueError(f"{name}: {NO_FLOAT16}")
        return replace(policy, master=torch.float32, state=torch.float32, scale=is_float16)

    # ---------------------------------------------------------------- set-up

    @property
    def mode(self) -> str:
        """The mode that the user asked for, without the master weights and scaling that DeepSpeed adds."""
        return self._mode

    def refuses(self, strategy: Strategy) -> str | None:
        """Returns why not: it needs a DeepSpeed engine."""
        if strategy.name != "deepspeed":
            return f'it runs under DeepSpeedStrategy only: pass strategy="deepspeed", or precision="{self._mode}"'
        return super().refuses(strategy)

    def connect(self, strategy: Strategy) -> None:
        """Takes the device, and from the strategy's config whether there are master weights."""
        self._device_type = strategy.device.type
        self.wrapped = self._make_wrapped()
        if self.policy.params is torch.bfloat16:
            pure = has_pure_state(getattr(strategy, "config", None))
            master, state = (None, torch.bfloat16) if pure else (torch.float32, torch.float32)
            self.policy = replace(self.policy, master=master, state=state)

    def _make_wrapped(self) -> Precision:
        """Returns core's plugin for the mode: it converts, and runs forward, as it does on one device."""
        if self.policy.params in _HALF:
            return self._make_half()
        return make_plugin(self._core_policy, self._device_type)

    def register_optimizers(self, *optimizers: Optimizer) -> None:
        """Takes note of the optimizers; the engine steps them, and not in the parameters' dtype."""
        self.scaler.register(optimizers)

    # ---------------------------------------------------------------- scaling

    @cached_property
    def scaler(self) -> EngineScaler:
        """Reads and sets the engine's loss scale; the engine applies it."""
        if not self.policy.scale:
            return EngineScaler()
        return DynamicScaler(**self._scaler_options) if self.policy.mixed else SectionScaler()


def _check_amp(amp_type: str, amp_level: str | None) -> None:
    if amp_type == "apex":
        raise ValueError(
            'amp_type="apex": DeepSpeed 0.19.8, the oldest that this package supports, has removed its amp section. '
            'In place of levels O1 and O2 pass amp_type="native" with precision="16-mixed", in place of O3 with '
            'precision="16-true"'
        )
    if amp_type != "native":
        raise ValueError(f'amp_type={amp_type!r}: allowed is "native"')
    if amp_level is not None:
        raise ValueError(
            f'amp_level={amp_level!r} is an option of apex, and amp_type="native" has no levels: leave it out'
        )


def _check_stored(name: str, policy: Policy) -> None:
    is_default = policy.master is None and policy.state is policy.params  # what the engine makes of that, is float32
    if policy.state is not torch.float32 and not is_default:
        raise ValueError(f"{name}: the engine keeps its optimizer's state in float32, leave state out")
    if policy.rounding != "nearest" or policy.grads is not policy.params:
        raise ValueError(
            f"{name}: the engine steps float32 master weights, which it rounds to nearest, and accumulates gradients "
            'as its config says ("data_types": {"grad_accum_dtype": "fp32"}): leave grads and rounding out'
        )


def _check_mixed(name: str, policy: Policy) -> Policy:
    if policy.params is not torch.float32 or policy.compute not in _HALF or policy.master is not None:
        raise ValueError(
            f"{name}: mixed precision is autocast over float32 parameters; half parameters with float32 master weights "
            f"are {' and '.join(mode for mode in MODES if mode in ('16-true', 'bf16-true'))} here"
        )
    if policy.reduce is not torch.float32:
        raise ValueError(f"{name}: {REDUCES_IN_FLOAT32}")
    if policy.scale and policy.compute is not torch.float16:
        raise ValueError(f"{name}: only float16 needs a scaled loss; pass scale=false")
    return policy
