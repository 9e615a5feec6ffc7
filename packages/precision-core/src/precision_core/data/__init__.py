"""Loaders that move, share out and resume; random generators.

Its modules are core's own; others import from here what `__all__` lists.
"""

from precision_core.data.loader import DeviceLoader

__all__ = [
    "DeviceLoader",
]
