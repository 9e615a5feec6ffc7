"""The loss scale, clipping, and counted steps.

Its modules are core's own; others import from here what `__all__` lists.
"""

from precision_core.scaling.clipping import Clip, clip_unscaled, make_clip
from precision_core.scaling.gradients import all_finite, multiply, params_of, takes_flag
from precision_core.scaling.scaler import NameOf, Scaler

__all__ = [
    "Clip",
    "NameOf",
    "Scaler",
    "all_finite",
    "clip_unscaled",
    "make_clip",
    "multiply",
    "params_of",
    "takes_flag",
]
