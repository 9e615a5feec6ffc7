"""Every installed mode under every installed strategy: it trains, or is refused at construction with the reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from precision_core import MODES, Fabric
from precision_core.strategies import STRATEGIES
from precision_core.support import PLUGINS, names, refusal, resolve_precision, resolve_strategy
from precision_core.support import STRATEGIES as GROUP
from precision_core.testing import Net, run_in_ranks
from precision_core.testing import train_net as train

ALL_MODES = [*MODES, *names(PLUGINS)]
ALL_STRATEGIES = [*STRATEGIES, *names(GROUP)]


# As in the contract: the same batches again and again, so that the loss of an untrained model does not change.
BATCHES = tuple(range(5)) * 4


@pytest.mark.parametrize("strategy", ALL_STRATEGIES)
@pytest.mark.parametrize("mode", ALL_MODES)
def test_a_pair_trains_or_is_refused_with_its_reason(
    mode: str, strategy: str, record_property: Callable[[str, object], None]
) -> None:
    def alone() -> str:  # DeepSpeed leaves traces in its process: a closure gets one of its own
        return try_pair(mode, strategy)

    engine = strategy == "deepspeed" and mode in MODES
    (result,) = run_in_ranks(1, alone) if engine else run_in_ranks(1, try_pair, mode, strategy)
    record_property("composition", (mode, strategy, result))


def try_pair(mode: str, strategy: str) -> str:
    """Returns what became of it."""
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
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    fabric.setup(model, optimizer)
    losses = train(fabric, model, optimizer, BATCHES)
    fabric.teardown()
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    return f"trains, {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps"
