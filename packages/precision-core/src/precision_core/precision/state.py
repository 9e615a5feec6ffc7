"""The state of a plugin, as `Precision.state_dict` returns it: its version, and what is taken over from it."""

from __future__ import annotations

from typing import Any

STATE_VERSION = 1

_COUNTS = ("steps", "skipped_steps", "skipped_in_a_row", "last_step_skipped")
_KEYS = ("version", "mode", "scaler", *_COUNTS)
_PASS = "pass the value of precision.state_dict()"


def check_state(state: Any) -> dict[str, Any]:
    """Returns `state`; raises `ValueError` unless it is what `Precision.state_dict` returns."""
    if not isinstance(state, dict):
        raise ValueError(f"not a Precision state dict (got {state!r:.80}): {_PASS}")
    missing = [key for key in _KEYS if key not in state]
    if missing:
        raise ValueError(f"not a Precision state dict (missing: {', '.join(missing)}): {_PASS}")
    if state["version"] != STATE_VERSION:
        raise ValueError(f"Precision state of version {state['version']!r}: this release reads version {STATE_VERSION}")
    wrong = [key for key, kind in (("mode", str), ("scaler", dict)) if not isinstance(state[key], kind)]
    wrong += [key for key in _COUNTS if type(state[key]) is not int or state[key] < 0]
    if wrong:
        raise ValueError(f"not a Precision state dict ({wrong[0]} is {state[wrong[0]]!r}): {_PASS}")
    return state


def what_of_scale(saved: bool, scales: bool) -> str:
    """Returns what becomes of the loss scale of another mode; `saved`: it had one, `scales`: this mode scales."""
    if scales:
        return "the loss scale was taken over" if saved else "the loss scale stays at its start"
    return "the loss scale was left out" if saved else "neither scales the loss"
