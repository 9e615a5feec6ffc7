"""The plugins, and what they do to a model.

Its modules are core's own; others import from here what `__all__` lists.
"""

from precision_core.precision.base import Precision
from precision_core.precision.double import DoublePrecision
from precision_core.precision.half import HalfPrecision
from precision_core.precision.mixed import MixedPrecision
from precision_core.precision.model.cast_module import cast_parameters
from precision_core.precision.model.default_dtype import created_as, outside_created_as
from precision_core.precision.model.regions import Restore
from precision_core.precision.model.report import Item, Report, module_bytes
from precision_core.precision.model.wide import RULES, marks
from precision_core.precision.plugins import make_plugin
from precision_core.precision.wrapping import Wrapping, hidden_parameters

__all__ = [
    "RULES",
    "DoublePrecision",
    "HalfPrecision",
    "Item",
    "MixedPrecision",
    "Precision",
    "Report",
    "Restore",
    "Wrapping",
    "cast_parameters",
    "created_as",
    "hidden_parameters",
    "make_plugin",
    "marks",
    "module_bytes",
    "outside_created_as",
]
