"""The reference engine: the recipes' arithmetic in plain torch, slow, on any device."""

from precision_te.reference.engine import ReferenceEngine as ReferenceEngine
from precision_te.reference.layers import ReferenceLinear as ReferenceLinear
