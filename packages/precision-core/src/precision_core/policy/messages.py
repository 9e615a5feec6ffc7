"""Parts of messages: the name that was meant, and the first of many."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def listed(names: Iterable[str], count: int = 10) -> str:
    """Returns "a, b, c", of more than `count` names the first and "and 5 more"."""
    names = list(names)
    return ", ".join(names[:count]) + f" and {len(names) - count} more" * (len(names) > count)


def nearest(given: str, allowed: Iterable[str]) -> str:
    """Returns `'; did you mean "..."?'` for the closest of `allowed`, or an empty string when none is close."""
    lower = {name.lower(): name for name in allowed}
    match = difflib.get_close_matches(given.strip().lower(), lower, n=1, cutoff=0.5)
    return f'; did you mean "{lower[match[0]]}"?' if match else ""
