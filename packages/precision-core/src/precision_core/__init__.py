"""precision-core: any number format for PyTorch training, with one argument."""

from precision_core.checkpoint import CheckpointError as CheckpointError
from precision_core.double import DoublePrecision as DoublePrecision
from precision_core.fabric import Fabric as Fabric
from precision_core.half import HalfPrecision as HalfPrecision
from precision_core.mixed import MixedPrecision as MixedPrecision
from precision_core.policy import ALIASES as ALIASES
from precision_core.policy import MODES as MODES
from precision_core.policy import Policy as Policy
from precision_core.precision import Precision as Precision
from precision_core.report import Report as Report
from precision_core.strategies import DDPStrategy as DDPStrategy
from precision_core.strategies import SingleDeviceStrategy as SingleDeviceStrategy
from precision_core.strategies import Strategy as Strategy
from precision_core.support import Support as Support
from precision_core.support import supports as supports
from precision_core.support_table import SupportRow as SupportRow
