"""Master modes under DDP: all ranks step rank zero's float32 values, whatever they began with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from precision_core import DDPStrategy, Fabric
from precision_core.testing import run_in_ranks
from precision_core.testing.net import Net, loss_of, make_batch
from precision_core.testing.stored import cut_small_models


def masters(mode: str, rounds: int) -> list[Tensor]:
    """Returns the values after steps with accumulation and clipping, and float32's own steps on the same gradients."""
    cut_small_models()
    fabric = Fabric("cpu", devices=2, strategy=DDPStrategy(), precision=mode)
    model, start = Net(fabric.global_rank), Net(0)  # each rank draws weights of its own
    optimizer = AdamW(model.parameters(), lr=1e-4)
    fabric.setup(model, optimizer)
    reference = [param.detach().clone() for param in start.parameters() if param.requires_grad]
    plain = AdamW(reference, lr=1e-4)
    trained = [param for param in model.parameters() if param.requires_grad]
    for step in range(rounds):
        optimizer.zero_grad()
        for micro in range(2):
            batch, target = make_batch(2 * step + micro + 10 * fabric.global_rank)
            with fabric.no_backward_sync(model, enabled=micro == 0):
                fabric.backward(loss_of(model(batch), target))
        norm, plugin = fabric.clip_gradients(model, optimizer, max_norm=0.1), fabric.precision_plugin
        assert norm is not None
        # float16 gradients stay as they are until the step
        factor = (0.1 / (norm + 1e-6)).clamp(max=1.0) / plugin.scale if plugin.policy.scale else 1.0
        for mine, theirs in zip(trained, reference, strict=True):
            theirs.grad = None if mine.grad is None else mine.grad.float() * factor
        optimizer.step()
        if not fabric.last_step_skipped:
            plain.step()
        exact = [fabric.precision_plugin.masters.value(param) for param in trained]
        assert all(torch.equal(a, b) for a, b in zip(exact, reference, strict=True))
    fabric.teardown()
    return exact


@pytest.mark.parametrize("mode", ["bf16-master", "16-master"])
def test_all_ranks_step_rank_zeros_values_and_float32s_own(mode: str) -> None:
    first, second = run_in_ranks(2, masters, mode, 4)
    assert len(first) == len(second) > 3
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
