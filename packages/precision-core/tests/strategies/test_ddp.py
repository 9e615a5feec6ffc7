"""DDP on two ranks: the contract, gradients and losses by value, the reduce dtype, overflow, and what is refused."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from precision_core import MODES, DDPStrategy, Fabric, Strategy
from precision_core.testing import StrategyContract, run_in_ranks

FULL = ("64-true", "16-true", "16-master", "bf16-master", "bf16-stochastic")
"""Others have these kinds of dtype and scale."""
WIDE_GRADIENTS = "params=bfloat16,master=float32,grads=float32"
needs_grad_dtype = pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch 2.10 brought grad_dtype")


class TestDDPStrategy(StrategyContract):
    modes = (
        *(pytest.param(mode, marks=pytest.mark.full) if mode in FULL else mode for mode in MODES),
        pytest.param(WIDE_GRADIENTS, marks=(pytest.mark.full, needs_grad_dtype)),
    )

    def make_strategy(self) -> Strategy:
        return DDPStrategy()

    def run(self, check: Callable[..., None], *args: Any) -> None:
        run_in_ranks(2, check, self, *args)


def make(mode: str, model: nn.Module, **options: Any) -> tuple[Fabric, torch.optim.Optimizer]:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=DDPStrategy(**options), precision=mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    fabric.setup(model, optimizer)
    return fabric, optimizer


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 2, bias=False)


def data(rank: int) -> torch.Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(rank + 1))


# -------------------------------------------------------------------- gradients


def gradient(mode: str, synced: bool = True) -> tuple[torch.Tensor, torch.dtype]:
    model = layer()
    fabric, _ = make(mode, model)
    with fabric.no_backward_sync(model, enabled=not synced):
        fabric.backward(model(data(fabric.global_rank)).pow(2).mean())
    assert model.weight.grad is not None
    return model.weight.grad.double(), model.weight.grad.dtype


def test_gradients_are_averaged_over_ranks() -> None:
    alone = [_alone(rank) for rank in range(2)]
    for gradients, dtype in run_in_ranks(2, gradient, "64-true"):
        assert dtype is torch.float64
        torch.testing.assert_close(gradients, (alone[0] + alone[1]) / 2, rtol=1e-12, atol=0)
    for (gradients, _), expected in zip(run_in_ranks(2, gradient, "64-true", False), alone, strict=True):
        torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=0)


def _alone(rank: int) -> torch.Tensor:
    model = layer().double()
    model(data(rank).double()).pow(2).mean().backward()
    assert model.weight.grad is not None
    return model.weight.grad


@pytest.mark.parametrize(
    ("policy", "reduce"),
    [
        ("32-true", torch.float32),
        ("params=float32,reduce=bfloat16", torch.bfloat16),
        ("params=float32,reduce=float16", torch.float16),
        ("bf16-mixed", torch.float32),
        ("params=float32,compute=bfloat16,reduce=bfloat16", torch.bfloat16),
        ("bf16-true", torch.bfloat16),
        ("params=bfloat16,reduce=float32", torch.float32),
        ("64-true", torch.float64),
    ],
)
def test_gradients_are_reduced_in_the_policys_dtype(policy: str, reduce: torch.dtype) -> None:
    params = torch.float64 if policy == "64-true" else torch.bfloat16 if "params=bf" in policy else None
    params = params or (torch.bfloat16 if policy == "bf16-true" else torch.float32)
    halves = [(torch.tensor(part).to(params).to(reduce) / 2) for part in (ROUNDED, [1.0, 1.0, 1.0])]
    expected = (halves[0] + halves[1]).to(params).double().tolist()
    for gradients in run_in_ranks(2, reduced, policy):
        assert gradients == expected


ROUNDED = [1.0, 1.0 + 2.0**-9, 1.0 + 2.0**-12]  # bfloat16 has 8 bits and keeps the first only, float16 11 and two


def reduced(policy: str) -> list[float]:
    model = nn.Linear(3, 1, bias=False)
    fabric, _ = make(policy, model)
    parts = [torch.tensor(ROUNDED), torch.tensor([1.0, 1.0, 1.0])]
    params = fabric.precision_plugin.policy.params
    loss = (model.weight * parts[fabric.global_rank].to(params)).sum()
    # The engine's forward has to have run, or its hooks do not fire.
    fabric.backward(loss + 0 * model(torch.zeros(1, 3)).sum())
    return model.weight.grad.double().flatten().tolist()  # type: ignore[union-attr]


def overflow_on(which: int) -> tuple[bool, int, int, float, list[float]]:
    model = layer()
    fabric, optimizer = make("16-mixed", model)
    plugin = fabric.precision_plugin
    for step in range(12):
        optimizer.zero_grad()
        loss = model(data(fabric.global_rank)).pow(2).mean()
        fabric.backward(loss * float("inf") if step == 8 and fabric.global_rank == which else loss)
        fabric.clip_gradients(model, optimizer, max_norm=0.1)
        optimizer.step()
        if step == 8:
            assert fabric.last_step_skipped
    return fabric.last_step_skipped, plugin.steps, plugin.skipped_steps, plugin.scale, model.weight.flatten().tolist()


@pytest.mark.parametrize("which", [0, 1])
def test_one_rank_that_overflows_is_a_skipped_step_on_all(which: int) -> None:
    first, second = run_in_ranks(2, overflow_on, which)
    assert first == second
    assert not first[0] and first[1] + first[2] == 12 and first[2] >= 1


# -------------------------------------------------------------------- the law of setup


def started() -> tuple[list[float], int, list[str], str]:
    torch.manual_seed(int(os.environ["RANK"]))
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    fabric, _ = make("32-true", model)
    model(data(fabric.global_rank))
    return model[0].weight.flatten().tolist(), len(calls), list(model.state_dict()), type(model).__name__


def test_ranks_start_from_rank_zeros_parameters_and_hooks_run_once() -> None:
    first, second = run_in_ranks(2, started)
    assert first == second
    assert first[1] == 1 and first[3] == "Sequential"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    assert first[0] == model[0].weight.flatten().tolist() and first[2] == list(model.state_dict())


def evaluated() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    fabric, _ = make("bf16-mixed", model)
    if fabric.is_global_zero:
        with torch.no_grad():
            model(data(0))
    fabric.barrier()


def test_evaluating_on_one_rank_waits_for_nobody() -> None:
    run_in_ranks(2, evaluated)


def train(mode: str, how: str) -> list[float]:
    model: Any = nn.Sequential(layer(), nn.Tanh())
    if how == "compiled before":
        model = torch.compile(model, backend="eager")
    elif how == "a block compiled":
        model[0].compile(backend="eager")
    fabric, optimizer = make(mode, model)
    for _ in range(2):
        optimizer.zero_grad()
        fabric.backward(model(data(fabric.global_rank)).pow(2).mean())
        optimizer.step()
    return [value for param in model.parameters() for value in param.flatten().tolist()]


@pytest.mark.parametrize("mode", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("how", ["compiled before", "a block compiled"])
def test_compiled_models_average_their_gradients_too(mode: str, how: str) -> None:
    expected = run_in_ranks(2, train, mode, "plain")
    assert expected[0] == expected[1] == run_in_ranks(2, train, mode, how)[0]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = layer()

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).pow(2).mean()


def two_models() -> list[float]:
    generator, critic = Two(), layer()
    fabric, _ = make("32-true", generator)
    fabric.setup(critic, torch.optim.SGD(critic.parameters(), lr=1.0))
    fabric.mark_forward_method(generator, "score")
    fabric.backward(generator.score(data(fabric.global_rank)) + critic(data(fabric.global_rank)).pow(2).mean())
    return [*generator.inner.weight.grad.flatten().tolist(), *critic.weight.grad.flatten().tolist()]  # type: ignore[union-attr]


def test_two_models_and_a_marked_method_run_in_their_engines() -> None:
    first, second = run_in_ranks(2, two_models)
    assert first == second and first[:8] == first[8:]


def frozen() -> float:
    fabric = Fabric(accelerator="cpu", devices=2)
    model = fabric.setup(layer().requires_grad_(False))
    return float(model(torch.ones(1, 4)).sum())


def test_a_model_without_parameters_that_train_needs_no_engine() -> None:
    assert len(set(run_in_ranks(2, frozen))) == 1


# -------------------------------------------------------------------- collectives


def collected() -> Any:
    fabric = Fabric(accelerator="cpu", devices=2)
    rank = fabric.global_rank
    tree = {"a": torch.tensor([rank, 10]), "b": [torch.tensor(float(rank), requires_grad=True)]}
    reduced = {op: fabric.all_reduce(tree, op) for op in ("mean", "sum", "min", "max")}
    with pytest.raises(ValueError, match=r"all_reduce\(op='product'\): allowed are mean, sum, min, max"):
        fabric.all_reduce(tree, "product")
    by_other_names = [fabric.all_reduce(tree, reduce_op=op) for op in ("avg", dist.ReduceOp.MAX, dist.ReduceOp.AVG)]
    assert [each["a"].tolist() for each in by_other_names] == [[0.5, 10.0], [1, 10], [0.5, 10.0]]
    gathered = fabric.all_gather(tree)
    sent = fabric.broadcast({"from": rank, "t": torch.full((2,), rank)}, src=1)
    assert (fabric.world_size, fabric.is_global_zero, fabric.local_rank) == (2, rank == 0, rank)
    fabric.barrier()
    return (
        {op: (tree["a"].tolist(), tree["b"][0].item()) for op, tree in reduced.items()},
        (gathered["a"].tolist(), gathered["b"][0].tolist()),
        (sent["from"], sent["t"].tolist()),
    )


def test_collectives_by_value() -> None:
    for reduced, gathered, sent in run_in_ranks(2, collected):
        assert reduced["mean"] == ([0.5, 10.0], 0.5) and reduced["sum"] == ([1, 20], 1.0)
        assert reduced["min"] == ([0, 10], 0.0) and reduced["max"] == ([1, 10], 1.0)
        assert gathered == ([[0, 10], [1, 10]], [0.0, 1.0]) and sent == (1, [1, 1])


def in_order(path: Path, local: bool, fails: bool) -> list[str]:
    fabric = Fabric(accelerator="cpu", devices=2)
    try:
        with fabric.rank_zero_first(local):
            time.sleep(0.3 * fabric.is_global_zero)
            seen = path.read_text().split() if path.exists() else []
            path.write_text(" ".join([*seen, str(fabric.global_rank)]))
            if fails and fabric.is_global_zero:
                raise OSError("no such dataset")
    except OSError:
        seen.append("failed")
    fabric.barrier()
    return [*seen, str(fabric.node_rank)]


@pytest.mark.parametrize("local", [False, True])
def test_rank_zero_runs_first_and_the_others_go_on_where_it_fails(local: bool, tmp_path: Path) -> None:
    assert run_in_ranks(2, in_order, tmp_path / "order", local, False) == [["0"], ["0", "0"]]
    assert run_in_ranks(2, in_order, tmp_path / "failing", local, True) == [["failed", "0"], ["0", "0"]]


def backends(given: str | None) -> str:
    Fabric(accelerator="cpu", devices=2, strategy=DDPStrategy(backend=given)).barrier()
    return str(dist.get_backend_config())


def test_the_backend_is_torchs_own_choice_or_the_users() -> None:
    assert all("cpu:gloo" in found for found in run_in_ranks(2, backends, None))
    assert all("cuda:gloo" in found for found in run_in_ranks(2, backends, "gloo"))


def test_one_process_does_as_many_would() -> None:
    fabric = Fabric(accelerator="cpu")
    assert fabric.all_gather(torch.ones(2)).shape == (1, 2) and fabric.broadcast("x") == "x"
    assert fabric.all_reduce(torch.tensor(3)) == 3.0 and fabric.all_reduce(torch.tensor(3), "sum").dtype is torch.int64
    fabric.barrier()
    with pytest.raises(ValueError, match="allowed are mean, sum, min, max"):
        fabric.all_reduce(torch.ones(1), "product")
