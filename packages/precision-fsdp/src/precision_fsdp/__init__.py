"""precision-fsdp: sharded training in any precision, on torch's FSDP2."""

from precision_fsdp.precision import FSDPPrecision as FSDPPrecision
from precision_fsdp.strategy import FSDPStrategy as FSDPStrategy
