"""The contracts: the plugin alone on one device, the strategy on two ranks in every mode of core."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from precision_core import MODES, Strategy
from precision_core.testing import Net, PrecisionContract, StrategyContract, make_batch, run_in_ranks
from precision_fsdp import FSDPPrecision, FSDPStrategy


@pytest.mark.parametrize("mode", ["64-true", "bf16-true", "bf16-mixed", "16-mixed"], scope="class")
class TestFSDPPrecision(PrecisionContract):
    @pytest.fixture(autouse=True)
    def _set_mode(self, mode: str) -> None:
        self.mode = mode

    def make_precision(self) -> FSDPPrecision:
        return FSDPPrecision(self.mode)


FULL = ("64-true", "16-true", "16-master", "bf16-master", "bf16-stochastic")
"""Others have these kinds of dtype and scale."""
WIDE_GRADIENTS = "params=bfloat16,master=float32,grads=float32"
needs_grad_dtype = pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch 2.10 brought grad_dtype")


class TestFSDPStrategy(StrategyContract):
    modes = (
        *(pytest.param(mode, marks=pytest.mark.full) if mode in FULL else mode for mode in MODES),
        pytest.param(WIDE_GRADIENTS, marks=(pytest.mark.full, needs_grad_dtype)),
    )

    def make_strategy(self) -> Strategy:
        return FSDPStrategy()

    def run(self, check: Callable[..., None], *args: Any) -> None:
        run_in_ranks(2, check, self, *args)

    def test_copies_of_a_model_are_complete(self) -> None:
        self.run(copies_are_refused)


def copies_are_refused(kit: StrategyContract) -> None:
    _, model, _ = kit.setup()
    for copy_of, what in ((copy.deepcopy, "a deepcopy"), (pickle.dumps, "a pickle")):
        with pytest.raises(RuntimeError, match=f"{what} of this Net would copy this process's shards only: "):
            copy_of(model)
    batch, _ = make_batch(0)
    assert torch.equal(model(batch), model(batch)) and isinstance(model, Net)  # as it was
