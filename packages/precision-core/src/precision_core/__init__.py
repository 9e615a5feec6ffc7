"""precision-core: any number format for PyTorch training, with one argument."""

from precision_core.checkpoint.error import CheckpointError as CheckpointError
from precision_core.fabric import Fabric as Fabric
from precision_core.policy.policy import ALIASES as ALIASES
from precision_core.policy.policy import MODES as MODES
from precision_core.policy.policy import Policy as Policy
from precision_core.precision.base import Precision as Precision
from precision_core.precision.double import DoublePrecision as DoublePrecision
from precision_core.precision.half import HalfPrecision as HalfPrecision
from precision_core.precision.mixed import MixedPrecision as MixedPrecision
from precision_core.precision.model.report import Report as Report
from precision_core.strategies import DDPStrategy as DDPStrategy
from precision_core.strategies import SingleDeviceStrategy as SingleDeviceStrategy
from precision_core.strategies import Strategy as Strategy
from precision_core.support.support import Support as Support
from precision_core.support.support import supports as supports
from precision_core.support.table import SupportRow as SupportRow
