"""The training problem: the same each time, and trained as its arguments say."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import nn

from precision_core import Fabric, SingleDeviceStrategy
from precision_core.strategies import Group
from precision_core.testing.problem import ROWS, Problem, adamw, mean_curve, train


def fabric(mode: str = "32-true") -> Fabric:
    return Fabric(accelerator="cpu", precision=mode)


def test_weights_and_data_depend_on_the_seed_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = Problem(3), Problem(3), Problem(4)
    for mine, same, another in zip(*(problem.model().parameters() for problem in (first, again, other)), strict=True):
        assert mine.dtype is torch.float32 and torch.equal(mine, same)
        assert mine.dim() == 1 or not torch.equal(mine, another)
    assert torch.equal(first.batch(6), again.batch(6)) and not torch.equal(first.batch(6), other.batch(6))
    assert torch.equal(first.batch(6), first.batch(2)) and not torch.equal(first.batch(6), first.batch(3))
    assert torch.equal(before, torch.get_rng_state())


def test_it_learns() -> None:
    curve = train(fabric(), steps=40)
    assert len(curve) == 40 and curve == train(fabric(), steps=40)
    assert curve[0] == pytest.approx(math.log(32), abs=0.3) and sum(curve[-4:]) / 4 < 0.97 * sum(curve[:4]) / 4


def test_rounding_by_chance_depends_on_the_problems_seed_alone() -> None:
    curves = []
    with torch.random.fork_rng(devices=[]):
        for seed in (1, 2):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            curves.append(train(fabric("bf16-stochastic"), steps=6))
            assert torch.equal(before, torch.get_rng_state())
    assert curves[0] == curves[1]


def test_the_loss_is_not_rounded_to_the_output_dtype() -> None:
    policy = "params=float32,output=bfloat16"
    loss = train(Fabric(accelerator="cpu", precision=policy), steps=1)[0]
    assert torch.tensor(loss, dtype=torch.float32).bfloat16().item() != loss


def test_ranks_share_the_global_batch() -> None:
    whole = train(fabric(), steps=2)
    ranks = [train(fabric(), steps=2, rank=rank, world_size=3) for rank in range(3)]
    assert len({curve[0] for curve in ranks}) == 3
    mean = mean_curve(ranks)
    assert mean[0] == pytest.approx(whole[0], rel=1e-6) and mean[1] != pytest.approx(whole[1], rel=1e-6)


@pytest.mark.parametrize(("world_size", "accumulate"), [(5, 1), (4, 4)])
def test_a_batch_that_does_not_divide_is_refused(world_size: int, accumulate: int) -> None:
    with pytest.raises(ValueError, match=f"{ROWS} rows .* {world_size} ranks with {accumulate} microbatches"):
        train(fabric(), steps=1, rank=0, world_size=world_size, accumulate=accumulate)


class Ranked(SingleDeviceStrategy):
    """One rank of four, which notes when gradients would be reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.group = Group()
        self.group.rank, self.group.world_size = 2, 4
        self.unreduced: list[bool] = []

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        self.unreduced.append(enabled)
        return nullcontext()


def test_the_fabric_says_which_rank_this_is_and_reduces_once_a_step() -> None:
    strategy = Ranked()
    curve = train(Fabric(strategy=strategy), steps=2, accumulate=3)
    assert curve == train(fabric(), steps=2, accumulate=3, rank=2, world_size=4)
    assert strategy.unreduced == [True, True, False] * 2


def test_a_factor_is_seen_by_backward_alone() -> None:
    plain, doubled = train(fabric(), steps=2), train(fabric(), steps=2, gradient_factor=2.0)
    assert plain[0] == doubled[0] and plain[1] != doubled[1]


def test_after_step_sees_the_model_after_each_step() -> None:
    seen: list[torch.Tensor] = []
    train(fabric(), steps=3, after_step=lambda model: seen.append(next(model.parameters()).detach().clone()))
    assert len(seen) == 3 and not torch.equal(seen[0], seen[1])


def test_another_optimizer() -> None:
    assert train(fabric(), steps=8, optimizer=adamw)[-1] < train(fabric(), steps=8)[-1]
