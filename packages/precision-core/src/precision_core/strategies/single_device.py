"""One process, one device."""

from __future__ import annotations

import torch

from precision_core.strategies.base import Strategy


class SingleDeviceStrategy(Strategy):
    """Runs on `device` in this process."""

    name = "single_device"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
