"""What an audit observes is what the precision's policy says: every mode under every strategy, by value."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from precision_core import MODES, Fabric
from precision_core.strategies import STRATEGIES
from precision_core.support import STRATEGIES as GROUP
from precision_core.support import names
from precision_core.testing import run_in_ranks
from precision_lab import audit
from precision_lab.auditing.observed import FIELDS, named, observed


class Model(nn.Module):
    """Has floating buffers that are no running statistics, which stay float32 by rule."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4))
        self.register_buffer("offset", torch.arange(16) / 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x + self.offset)


def observe(mode: str, strategy: str, devices: int) -> tuple[dict[str, list[str]], dict[str, str], list[str]] | str:
    """Returns what was observed, what the plugin's policy says, and the findings above info; or why it was refused."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    try:
        fabric = Fabric(accelerator="cpu", precision=mode, strategy=strategy, devices=devices)
        fabric.setup(model, optimizer)
    except ValueError as error:  # DeepSpeed's engine asks the accelerator only when it is set up
        return str(error)
    with audit() as report:
        for _ in range(2):
            loss = nn.functional.cross_entropy(model(torch.randn(8, 16)), torch.randint(4, (8,)))
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
    policy = fabric.precision_plugin.policy
    fabric.teardown()
    said = {field: str(getattr(policy, field)).removeprefix("torch.").lower() for field in FIELDS}
    return observed(report.record), said, [each.code for each in report.at("warning")]


@pytest.mark.parametrize("mode", MODES)
def test_on_one_device_every_field_is_the_policys(mode: str) -> None:
    result = observe(mode, "auto", 1)
    assert not isinstance(result, str)
    seen, said, found = result
    assert "reduce" not in seen and not found
    assert seen == {field: [said[field]] for field in FIELDS if field != "reduce"}
    assert named(seen) == ("bf16-true" if mode == "bf16-stochastic" else mode)


@pytest.mark.full
@pytest.mark.parametrize("strategy", [*STRATEGIES, *names(GROUP)])
@pytest.mark.parametrize("mode", MODES)
def test_on_two_ranks_every_field_is_the_policys(mode: str, strategy: str) -> None:
    if strategy in ("single_device", "xla"):
        pytest.skip("has one process")
    results = run_in_ranks(2, lambda: observe(mode, strategy, 2))
    if isinstance(results[0], str):
        assert mode in results[0] and strategy == "deepspeed"
        return
    for seen, said, found in results:
        # DeepSpeed's engine takes gradients away before the step.
        expected = {field: [said[field]] for field in FIELDS if (strategy, field) != ("deepspeed", "grads")}
        assert seen == expected and not found
