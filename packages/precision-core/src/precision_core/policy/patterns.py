"""Name patterns: how a user points at modules, parameters and buffers by dotted name.

A pattern matches a name when it equals the name or the name's end at a dot boundary, with `*` for any run of
characters: `"lm_head"` matches `lm_head` and `model.lm_head`, `"blocks.1"` does not match `blocks.10`, `"*.norm"` and
`"norm"` both match `norm` and `blocks.0.norm`, `"blocks.*.bias"` matches `blocks.0.attn.bias`. What is said of a module
holds for everything inside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache

from precision_core.policy.messages import nearest


@lru_cache(maxsize=1024)
def _regex(pattern: str) -> re.Pattern[str]:
    body = pattern.removeprefix("*.")  # "*.norm" means any module called norm, at the top level too
    return re.compile(r"(?:.*\.)?" + ".*".join(re.escape(part) for part in body.split("*")), re.DOTALL)


def check_pattern(pattern: str) -> str:
    """Returns `pattern`; raises `ValueError` when it is empty or has characters that no pattern may have."""
    if not isinstance(pattern, str) or not re.fullmatch(r"[^\s;:]+", pattern):
        raise ValueError(
            f"bad name pattern {pattern!r}: expected a dotted name such as 'lm_head', 'blocks.1' or '*.norm' "
            "without blanks, ';' or ':'"
        )
    return pattern


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` names `name` itself."""
    return _regex(pattern).fullmatch(name) is not None


def covers(pattern: str, name: str) -> bool:
    """Whether `pattern` names `name` or a module that contains it."""
    parts = name.split(".")
    return any(matches(pattern, ".".join(parts[:end])) for end in range(len(parts), 0, -1))


def check_all_used(
    patterns: Iterable[str], names: Iterable[str], what: str, holds: Callable[[str, str], bool] = matches
) -> None:
    """Raises `ValueError` naming the first of `patterns` that holds for none of `names` (`what`: "module", ...)."""
    names = list(names)
    for pattern in patterns:
        if not any(holds(pattern, name) for name in names):
            hint = nearest(pattern, names) or nearest(pattern, {name.rpartition(".")[2] for name in names})
            raise ValueError(f"the pattern {pattern!r} matches no {what} of this model{hint} [no-such-module]")
