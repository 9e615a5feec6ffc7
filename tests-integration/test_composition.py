"""Every installed mode under every installed strategy: it trains, or is refused at construction with the reason."""

from __future__ import annotations

import pytest
import torch

from precision_core import MODES, Fabric
from precision_core.composition import refusal
from precision_core.discovery import PLUGINS, names
from precision_core.discovery import STRATEGIES as GROUP
from precision_core.resolve import resolve_precision, resolve_strategy
from precision_core.strategies import STRATEGIES
from precision_core.testing import run_in_ranks
from precision_core.testing.checks_loop import train
from precision_core.testing.net import Net

ALL_MODES = [*MODES, *names(PLUGINS)]
ALL_STRATEGIES = [*STRATEGIES, *names(GROUP)]


@pytest.mark.parametrize("strategy", ALL_STRATEGIES)
@pytest.mark.parametrize("mode", ALL_MODES)
def test_a_pair_trains_or_is_refused_with_its_reason(
    mode: str, strategy: str, composition: dict[tuple[str, str], str]
) -> None:
    (composition[mode, strategy],) = run_in_ranks(1, try_pair, mode, strategy)  # engines leave traces in their process


def try_pair(mode: str, strategy: str) -> str:
    """Returns what became of it, in a process of its own."""
    try:
        fabric = Fabric(accelerator="cpu", precision=mode, strategy=strategy)
    except ValueError as error:
        under = resolve_strategy(strategy, "cpu", "auto", 1)[0]
        try:
            plugin = resolve_precision(mode, under)
        except ValueError as alone:  # the engine's plugin has no such mode
            assert str(alone) == str(error) and mode in str(error)
            return f"refused: {error}"
        reason = refusal(plugin, under)
        assert reason and reason in str(error) and mode in str(error) and type(under).__name__ in str(error)
        return f"refused: {reason}"
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    fabric.setup(model, optimizer)
    losses = train(fabric, model, optimizer, range(60))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    return f"trains, {losses[0]:.4f} to {losses[-1]:.4f} in 60 steps"
