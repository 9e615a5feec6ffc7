"""precision-kahan: bfloat16 parameters that do not lose small updates, as a plugin of precision-core."""

from precision_kahan.plugin import KahanPrecision as KahanPrecision
