"""What tests of backends and of third parties share: contracts, and the yardstick for training curves. Needs pytest."""

import pytest

# The checks assert; pytest explains a failed assert only in modules that it is told of before they are imported.
pytest.register_assert_rewrite(*(f"{__name__}.checks_{part}" for part in ("curve", "hooks", "loop", "setup", "state")))

from precision_core.testing.contract import PrecisionContract as PrecisionContract  # noqa: E402
from precision_core.testing.contract import StrategyContract as StrategyContract  # noqa: E402
from precision_core.testing.controls import controls as controls  # noqa: E402
from precision_core.testing.hardware import needs as needs  # noqa: E402
from precision_core.testing.loss_bound import curve_distance as curve_distance  # noqa: E402
from precision_core.testing.loss_bound import loss_bound as loss_bound  # noqa: E402
from precision_core.testing.problem import Problem as Problem  # noqa: E402
from precision_core.testing.problem import train as train  # noqa: E402
from precision_core.testing.ranks import RankError as RankError  # noqa: E402
from precision_core.testing.ranks import run_in_ranks as run_in_ranks  # noqa: E402
