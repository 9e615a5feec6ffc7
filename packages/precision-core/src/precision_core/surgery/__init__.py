"""Layers replaced by others, everything else kept.

Other packages import what `__all__` lists from here; the modules themselves are private.
"""

from precision_core.surgery.layers import shown
from precision_core.surgery.replace import Replacement, Surgery, replace_layers

__all__ = [
    "Replacement",
    "Surgery",
    "replace_layers",
    "shown",
]
