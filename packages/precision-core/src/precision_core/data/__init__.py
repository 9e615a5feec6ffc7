"""Loaders that move, share out and resume; random generators.

Other packages import what `__all__` lists from here; the modules themselves are private.
"""

from precision_core.data.loader import DeviceLoader

__all__ = [
    "DeviceLoader",
]
