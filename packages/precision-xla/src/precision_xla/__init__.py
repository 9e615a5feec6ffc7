"""XLA devices for precision-core: TPUs, and PJRT on the CPU, by torch_xla. Importing this starts nothing."""

from precision_xla.precision import XLAPrecision as XLAPrecision
from precision_xla.strategy import XLAStrategy as XLAStrategy
