"""Composition: whether a plugin runs under a strategy, decided before a model or an engine is touched."""

from __future__ import annotations

from precision_core.precision.base import Precision
from precision_core.strategies import Strategy


def refusal(precision: Precision, strategy: Strategy) -> str | None:
    """Returns why `precision` cannot run under `strategy`, and what to pass instead; None: it can.

    Both are asked: the plugin (`Precision.refuses`), then the strategy (`Strategy.refuses`).
    """
    return precision.refuses(strategy) or strategy.refuses(precision)


def check_composition(precision: Precision, strategy: Strategy) -> None:
    """Raises `ValueError` naming the pair and the reason when `precision` cannot run under `strategy`."""
    reason = refusal(precision, strategy)
    if reason is not None:
        raise ValueError(
            f'precision="{precision.mode}" ({type(precision).__name__}) cannot run under {type(strategy).__name__} '
            f"on {strategy.device}: {reason}"
        )
