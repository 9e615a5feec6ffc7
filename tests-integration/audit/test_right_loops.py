"""Right loops give no finding above info, and compute the same bits under observation."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from precision_core.testing import run_in_ranks
from precision_lab import audit


def loops(name: str) -> dict[str, Callable[[str], Any]]:
    """Returns the loops of a file beside this one, which others can then import."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LOOPS


ALL = {**{f"torch:{name}": each for name, each in loops("right_torch").items()}, **loops("right_libraries")}


def weights_after_steps(name: str, folder: str, observed: bool) -> tuple[list[str], list[str]]:
    """Returns a digest of all parameters after each step, and the findings above info."""
    digests = []

    def digest(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        values = [param for group in optimizer.param_groups for param in group["params"]]
        parts = [bytes(value.detach().contiguous().cpu().view(torch.uint8).numpy()) for value in values if value.dim()]
        digests.append(hashlib.sha256(b"".join(parts)).hexdigest())

    torch.manual_seed(0)
    hook = register_optimizer_step_post_hook(digest)
    with hook_removed(hook), audit() if observed else nullcontext() as report:
        ALL[name](folder)
    found = report.at("warning") if report else []
    return digests, [f"{each.code} at {each.where}: {each.what}" for each in found]


@contextmanager
def hook_removed(hook: Any) -> Iterator[None]:
    try:
        yield
    finally:
        hook.remove()


def both(name: str, folder: str) -> tuple[list[str], list[str], list[str]]:
    warnings.simplefilter("ignore")  # of libraries
    plain, _ = weights_after_steps(name, f"{folder}/plain", observed=False)
    return plain, *weights_after_steps(name, f"{folder}/observed", observed=True)


@pytest.mark.full
@pytest.mark.parametrize("name", ALL)
def test_nothing_above_info_and_the_same_bits(name: str, tmp_path: Path) -> None:
    needs = name.partition(":")[0]
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    for folder in ("plain", "observed"):
        (tmp_path / folder).mkdir()
    ((plain, observed, findings),) = run_in_ranks(1, both, name, str(tmp_path))
    assert findings == []
    assert plain == observed and len(plain) >= 2
