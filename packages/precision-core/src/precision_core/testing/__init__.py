"""For tests of backends and third parties: contracts, and a calibrated bound for training curves. Needs pytest."""

import pytest

# The checks assert; pytest explains failed asserts only in modules that are registered before they are imported.
pytest.register_assert_rewrite(*(f"{__name__}.checks_{part}" for part in ("curve", "hooks", "loop", "setup", "state")))

from precision_core.testing.checks_loop import train_net as train_net  # noqa: E402
from precision_core.testing.contract import PrecisionContract as PrecisionContract  # noqa: E402
from precision_core.testing.contract import StrategyContract as StrategyContract  # noqa: E402
from precision_core.testing.controls import LEFT_SCALED as LEFT_SCALED  # noqa: E402
from precision_core.testing.controls import LOWER as LOWER  # noqa: E402
from precision_core.testing.controls import controls as controls  # noqa: E402
from precision_core.testing.controls import round_parameters as round_parameters  # noqa: E402
from precision_core.testing.controls import variations as variations  # noqa: E402
from precision_core.testing.forks import CLEANUPS as CLEANUPS  # noqa: E402
from precision_core.testing.host_reads import HostReads as HostReads  # noqa: E402
from precision_core.testing.loss_bound import curve_distance as curve_distance  # noqa: E402
from precision_core.testing.loss_bound import loss_bound as loss_bound  # noqa: E402
from precision_core.testing.net import Net as Net  # noqa: E402
from precision_core.testing.net import loss_of as loss_of  # noqa: E402
from precision_core.testing.net import make_batch as make_batch  # noqa: E402
from precision_core.testing.problem import BATCHES as BATCHES  # noqa: E402
from precision_core.testing.problem import Problem as Problem  # noqa: E402
from precision_core.testing.problem import Transformer as Transformer  # noqa: E402
from precision_core.testing.problem import adamw as adamw  # noqa: E402
from precision_core.testing.problem import mean_curve as mean_curve  # noqa: E402
from precision_core.testing.problem import sgd as sgd  # noqa: E402
from precision_core.testing.problem import train as train  # noqa: E402
from precision_core.testing.ranks import RankError as RankError  # noqa: E402
from precision_core.testing.ranks import run_in_ranks as run_in_ranks  # noqa: E402
from precision_core.testing.required_hardware import needs as needs  # noqa: E402
from precision_core.testing.stored import cut_small_models as cut_small_models  # noqa: E402
from precision_core.testing.ten_steps import reads_of_ten_steps as reads_of_ten_steps  # noqa: E402
from precision_core.testing.ten_steps import small_model as small_model  # noqa: E402
