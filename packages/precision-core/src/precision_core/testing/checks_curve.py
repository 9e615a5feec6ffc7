"""A strategy's training curve is that of one device on the same global batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from precision_core.testing.controls import LEFT_SCALED
from precision_core.testing.loss_bound import curve_distance, loss_bound
from precision_core.testing.problem import train

if TYPE_CHECKING:
    from precision_core.testing.contract import StrategyContract

_STEPS = 20


def the_curve_is_that_of_one_device(kit: StrategyContract) -> None:
    reference = kit.reference_curve(_STEPS)
    bound = loss_bound(kit.mode, _STEPS)
    fabric = kit.make_fabric()
    assert curve_distance(kit.global_curve(fabric, train(fabric, steps=_STEPS)), reference) <= bound
    for factor in (2.0, LEFT_SCALED):  # ranks summed instead of averaged, gradients left scaled: must exceed the bound
        fabric = kit.make_fabric()
        wrong = kit.global_curve(fabric, train(fabric, steps=_STEPS, gradient_factor=factor))
        assert curve_distance(wrong, reference) > bound
