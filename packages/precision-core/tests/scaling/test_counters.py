"""StepCounter: the same counts whether flags are known at once or read later."""

from __future__ import annotations

import torch

from precision_core.scaling.counters import READ_EVERY, StepCounter


def test_flags_read_later_count_the_same() -> None:
    flags = [False, True, True, False, True] * 50
    now, later = StepCounter(), StepCounter()
    for flag in flags:
        now.add(flag)
        later.add_later(torch.tensor(float(flag)))
    assert now.state_dict() == later.state_dict()
    assert (now.steps, now.skipped, now.skipped_in_a_row, now.last_skipped) == (100, 150, 1, True)


def test_flags_are_read_at_most_every_hundred_steps() -> None:
    counter, flag = StepCounter(), torch.ones(())
    for _ in range(READ_EVERY - 1):
        counter.add_later(flag)
    assert counter.skipped == 0
    flag.zero_()  # what was handed over was a copy
    counter.add_later(flag)
    assert (counter.skipped, counter.steps) == (READ_EVERY - 1, 1)


def test_order_is_kept_when_both_are_mixed() -> None:
    counter = StepCounter()
    counter.add_later(torch.ones(()))
    counter.add(False)
    assert (counter.skipped_in_a_row, counter.last_skipped, counter.skipped, counter.steps) == (0, False, 1, 1)
