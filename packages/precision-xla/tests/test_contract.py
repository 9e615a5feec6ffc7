"""The contracts: the plugin in two modes, and the strategy, with the plugin that it picks, in all of core's."""

from __future__ import annotations

import pytest
import torch

from precision_core import Fabric, Strategy
from precision_core.testing import PrecisionContract, StrategyContract, loss_of, make_batch
from precision_core.testing import train_net as train
from precision_xla import XLAPrecision, XLAStrategy, vendor
from precision_xla.support import RUNS


@pytest.mark.parametrize("mode", ["bf16-true", "16-mixed"], scope="class")
class TestXLAPrecision(PrecisionContract):
    @pytest.fixture(autouse=True)
    def _set_mode(self, mode: str) -> None:
        self.mode = mode

    def make_precision(self) -> XLAPrecision:
        return XLAPrecision(self.mode)

    def make_fabric(self) -> Fabric:
        return Fabric(accelerator="cpu", strategy="xla", precision=self.make_precision())

    @pytest.mark.xfail(reason="module.to('xla') makes new parameters: in a loop by hand the optimizer is made after it")
    def test_a_loop_by_hand_equals_fabric(self) -> None:
        super().test_a_loop_by_hand_equals_fabric()

    def test_a_loop_by_hand_with_the_optimizer_made_after_the_move_equals_fabric(self) -> None:
        fabric, model, optimizer = self.setup()
        expected = train(fabric, model, optimizer, range(5))
        plugin, by_hand = self.make_precision(), self.make_model()
        by_hand = plugin.convert_module(by_hand).to(fabric.device)
        by_hand.head.weight = by_hand.embedding.weight  # the move has parted them
        mine = self.make_optimizer(by_hand)
        plugin.register_optimizers(mine)
        losses = []
        for step in range(5):
            batch, target = make_batch(step, device=fabric.device)
            mine.zero_grad()
            with plugin.forward_context():
                output = by_hand(plugin.convert_input(batch))
            loss = loss_of(plugin.convert_output(output), target)
            plugin.pre_backward(loss, by_hand).backward()
            plugin.optimizer_step(mine, by_hand, None)
            vendor.sync()  # as Fabric does: another graph is compiled to another rounding
            losses.append(loss.item())
        assert losses == expected
        assert all(map(torch.equal, by_hand.parameters(), model.parameters()))


class TestXLAStrategy(StrategyContract):
    modes = tuple(RUNS)

    def make_strategy(self) -> Strategy:
        return XLAStrategy()

    def test_the_curve_is_that_of_one_device(self, request: pytest.FixtureRequest) -> None:
        if self.mode == "64-true":
            reason = "torch_xla's GELU is right to 8 digits; test_curves.py has the curve with a better one"
            request.applymarker(pytest.mark.xfail(reason=reason))
        super().test_the_curve_is_that_of_one_device()
