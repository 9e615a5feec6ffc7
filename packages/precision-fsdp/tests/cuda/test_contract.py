"""The contracts on a GPU, one rank on NCCL, which takes one a GPU. Nobody has run these tests yet."""

from __future__ import annotations

import copy
import pickle

import pytest

from precision_core import MODES, Fabric, Strategy
from precision_core.testing import PrecisionContract, StrategyContract, needs
from precision_fsdp import FSDPPrecision, FSDPStrategy

pytestmark = needs("cuda")


@pytest.mark.parametrize("mode", ["64-true", "bf16-true", "bf16-mixed", "16-mixed"], scope="class")
class TestFSDPPrecision(PrecisionContract):
    accelerator = "cuda"

    @pytest.fixture(autouse=True)
    def _set_mode(self, mode: str) -> None:
        self.mode = mode

    def make_precision(self) -> FSDPPrecision:
        return FSDPPrecision(self.mode)

    def make_fabric(self) -> Fabric:
        return Fabric(self.accelerator, devices=1, precision=self.make_precision())


class TestFSDPStrategy(StrategyContract):
    accelerator = "cuda"
    modes = tuple(MODES)

    def make_strategy(self) -> Strategy:
        return FSDPStrategy()

    def make_fabric(self) -> Fabric:
        return Fabric(self.accelerator, self.make_strategy(), devices=1, precision=self.mode)

    def test_copies_of_a_model_are_whole(self) -> None:
        _, model, _ = self.setup()
        for copy_of in (copy.deepcopy, pickle.dumps):
            with pytest.raises(RuntimeError, match="would copy this process's shards only: "):
                copy_of(model)


class TestNCCLAlone(TestFSDPStrategy):
    """A group that sends no tensors of the CPU."""

    modes = ("bf16-mixed",)

    def make_strategy(self) -> Strategy:
        return FSDPStrategy(backend="nccl")
