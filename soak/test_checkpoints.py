"""The random tests of checkpoints and of the loss scale, for longer: each with other seeds and ten times the tries.

`pytest soak --times 10` takes ten times as long again.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from torch.optim import SGD, AdamW

TESTS = Path(__file__).parents[1] / "packages" / "precision-core" / "tests"


def load(name: str) -> ModuleType:
    """Returns a test module of precision-core."""
    spec = importlib.util.spec_from_file_location(f"soak_{Path(name).name}", TESTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_processes(tmp_path: Path, times: int) -> None:
    forked, fresh = 2000 * times, 10 * times
    lost, _ = load("checkpoint/storage/test_file_kill").kill_at_random(tmp_path, forked, fresh, seed=1)
    print(f"killed while saving: tried {forked + fresh}, lost {lost}")
    assert lost == 0


def test_corrupted_checkpoints(tmp_path: Path, times: int) -> None:
    seen = load("checkpoint/storage/test_file_corruption").corrupt_at_random(tmp_path, 10_000 * times, seed=1)
    wrong = {key: count for key, count in seen.items() if key[1] not in ("equal", "refused")}
    print(f"corrupted checkpoints: tried {10_000 * times}, lost {sum(wrong.values())}")
    assert not wrong


@pytest.mark.parametrize("optimizer_type", [SGD, AdamW])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_injected_overflows(optimizer_type: type[SGD | AdamW], where: str, times: int) -> None:
    steps = 5000 * times
    injected, skipped = load("scaling/test_injected_overflows").inject(optimizer_type, where, steps, seed=1)
    print(f"inf and NaN in {optimizer_type.__name__}'s {where}: {steps} steps, injected {injected}, skipped {skipped}")
