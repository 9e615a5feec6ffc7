"""Strategies that core brings."""

from precision_core.strategies.base import Strategy as Strategy
from precision_core.strategies.single_device import SingleDeviceStrategy as SingleDeviceStrategy
