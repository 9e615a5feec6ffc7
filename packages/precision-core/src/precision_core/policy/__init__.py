"""Which dtype each part of training has, as a value.

Its modules are core's own; others import from here what `__all__` lists.
"""

from precision_core.policy.casting import cast_tensor, map_tensors
from precision_core.policy.dtypes import FLOAT_DTYPES, dtype_name, parse_dtype
from precision_core.policy.messages import listed, nearest
from precision_core.policy.patterns import check_pattern, covers, matches
from precision_core.policy.policy import ALIASES, MODES, Policy
from precision_core.policy.stored import stores_as_torch

__all__ = [
    "ALIASES",
    "FLOAT_DTYPES",
    "MODES",
    "Policy",
    "cast_tensor",
    "check_pattern",
    "covers",
    "dtype_name",
    "listed",
    "map_tensors",
    "matches",
    "nearest",
    "parse_dtype",
    "stores_as_torch",
]
