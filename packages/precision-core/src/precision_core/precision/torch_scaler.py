"""The `scaler` argument of plugins that scale the loss: torch's own scaler, or options to make one with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch.amp.grad_scaler import GradScaler

from precision_core.hardware import is_available
from precision_core.policy.policy import Policy

_OPTIONS = ("init_scale", "growth_factor", "backoff_factor", "growth_interval")


def check_scaler(
    scaler: GradScaler | Mapping[str, float] | None,
    policy: Policy,
    device_type: str | None,
    name: str = "MixedPrecision",
) -> GradScaler | dict[str, float]:
    """Returns the scaler, or the options to make one with; `device_type` None: any that is here, `name`: of the plugin.

    Raises:
        ValueError: the policy does not scale, unknown or invalid options, a scaler that torch has disabled, or one for
            another device.
    """
    if scaler is None:
        return {}
    if not policy.scale:
        raise ValueError(f"{name}({str(policy)!r}, scaler=...): this policy does not scale the loss; leave it out")
    if isinstance(scaler, Mapping):
        unknown = sorted(set(scaler) - set(_OPTIONS))
        if unknown:
            raise ValueError(f"{name}(scaler={dict(scaler)}): unknown {unknown}; allowed are {_OPTIONS}")
        options = dict(scaler)
        try:
            GradScaler("cpu", **options)  # type: ignore[arg-type]  # torch's own checks, on a device that is always here
        except (AssertionError, TypeError) as error:
            raise ValueError(f"{name}(scaler={options}): {error}") from error
        return options
    if not isinstance(scaler, GradScaler):
        raise ValueError(f"{name}(scaler={scaler!r}): expected a torch.amp.GradScaler or a dict of its options")
    scaler_device = torch.device(getattr(scaler, "_device", device_type or "cuda")).type
    example = f'{name}("{policy.flat}", ' + ("" if device_type is None else 'device="cpu", ')
    if not scaler.is_enabled():
        reason = "was made with enabled=False"
        if not is_available(scaler_device):
            reason = f"is for {scaler_device!r}, which is not here, so torch has disabled it and dropped its values"
        raise ValueError(
            f"{name}(scaler=...): the scaler {reason}. For the CPU: "
            f'{example}scaler=torch.amp.GradScaler("cpu", ...)); without scaling: '
            f'precision="{replace(policy, scale=False)}"'
        )
    if device_type is not None and scaler_device != device_type:
        raise ValueError(f"MixedPrecision(device={device_type!r}) got a scaler for {scaler_device!r}: use one device")
    return scaler
