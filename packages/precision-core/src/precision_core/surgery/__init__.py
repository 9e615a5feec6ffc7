"""Layers replaced by others, everything else kept.

Its modules are core's own; others import from here what `__all__` lists.
"""

from precision_core.surgery.layers import shown
from precision_core.surgery.replace import Replacement, Surgery, replace_layers

__all__ = [
    "Replacement",
    "Surgery",
    "replace_layers",
    "shown",
]
