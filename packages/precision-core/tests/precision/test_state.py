"""State: what is no state of a plugin is refused with what is wrong about it, before anything changes."""

from __future__ import annotations

from typing import Any

import pytest

from precision_core.precision.base import Precision

WRONG: list[tuple[Any, str]] = [
    ([1, 2], r"not a Precision state dict \(got \[1, 2\]\): pass the value of precision\.state_dict\(\)"),
    ({"version": 1, "mode": "32-true"}, r"\(missing: scaler, steps, skipped_steps, skipped_in_a_row, last_step_sk"),
    ({"version": 2}, "version 2: this release reads version 1"),
    ({"mode": 32}, r"\(mode is 32\): pass"),
    ({"scaler": None}, r"\(scaler is None\): pass"),
    ({"steps": True}, r"\(steps is True\): pass"),
    ({"skipped_steps": -1}, r"\(skipped_steps is -1\): pass"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_what_is_no_state_is_refused_by_name(change: Any, message: str) -> None:
    plugin = Precision()
    state = plugin.state_dict()
    given = change if isinstance(change, list) or len(change) > 1 else {**state, **change}
    with pytest.raises(ValueError, match=message):
        plugin.load_state_dict(given)
    assert plugin.state_dict() == state
