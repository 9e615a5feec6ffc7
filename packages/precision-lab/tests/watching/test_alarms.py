"""Each mistake is told once for as long as it lasts."""

from __future__ import annotations

from precision_lab.watching.alarms import MAX_SKIPS, Alarms


def test_a_gradient_and_the_loss_after_it_are_one_alarm() -> None:
    alarms = Alarms()
    assert alarms.loss(1, 1.0, None) is None and alarms.gradient(1, 3.0, False) is None
    assert alarms.gradient(2, float("nan"), True) is None  # a scaler looks after it
    found = alarms.gradient(2, float("nan"), False)
    assert found is not None and (found.kind, found.step) == ("gradients", 2)
    assert alarms.ended(2, False, False) is None and alarms.loss(3, float("nan"), None) is None
    alarms.ended(3, False, False)
    alarms.ended(4, True, False)
    again = alarms.loss(5, float("inf"), None)
    assert again is not None and again.kind == "loss"


def test_skips() -> None:
    alarms = Alarms()
    found = [alarms.ended(number, True, True) for number in range(1, 2 * MAX_SKIPS)]
    assert [each.step for each in found if each is not None] == [MAX_SKIPS]
