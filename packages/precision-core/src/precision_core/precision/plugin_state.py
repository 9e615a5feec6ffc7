"""The state of a precision plugin: its version, and the check of what someone hands back."""

from __future__ import annotations

from typing import Any

STATE_VERSION = 1


def check_state(state: Any) -> dict[str, Any]:
    """Returns `state`; raises `ValueError` unless it is what `Precision.state_dict` returns."""
    counts = ("steps", "skipped_steps", "skipped_in_a_row", "last_step_skipped")
    if not isinstance(state, dict) or not {"version", "mode", "scaler", *counts} <= state.keys():
        raise ValueError(f"this is no precision state: {str(state)[:80]}; pass what precision.state_dict() returned")
    if state["version"] != STATE_VERSION:
        raise ValueError(f"precision state of version {state['version']!r}: this release reads version {STATE_VERSION}")
    if not isinstance(state["mode"], str) or not isinstance(state["scaler"], dict):
        raise ValueError("this is no precision state: mode is no string, or scaler is no dict")
    for key in counts:
        if type(state[key]) is not int or state[key] < 0:
            raise ValueError(f"this is no precision state: {key} is {state[key]!r}")
    return state
