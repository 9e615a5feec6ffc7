"""FSDPPrecision alone: one class for every mode, the user's scaler, and a hand-written fully_shard loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from precision_core import MODES, DoublePrecision, Fabric, Policy, Precision, supports
from precision_core.testing import BATCHES, Problem, curve_distance, loss_bound, mean_curve, run_in_ranks, sgd, train
from precision_fsdp import FSDPPrecision, FSDPStrategy


@pytest.mark.parametrize("mode", [*MODES, 16, "bf16", 64, "bf16-mixed; *.norm: 32-true"])
def test_one_class_runs_every_mode(mode: Any) -> None:
    plugin = FSDPPrecision(mode)
    assert isinstance(plugin, Precision) and type(plugin) is FSDPPrecision
    assert plugin.policy == Policy.parse(mode) and plugin.mode == str(Policy.parse(mode))


def test_signature_and_refusals() -> None:
    assert FSDPPrecision().mode == "32-true"
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)  # type: ignore[attr-defined]
    assert FSDPPrecision("16-mixed", scaler).scale == 4.0
    assert FSDPPrecision("16-mixed", {"init_scale": 8.0}).scale == 8.0
    for arguments, message in (
        (("bf16-mixed", scaler), r"FSDPPrecision\('bf16-mixed', scaler=...\): this policy does not scale the loss"),
        (("16-mixed", 3), r"FSDPPrecision\(scaler=3\): expected a torch.amp.GradScaler"),
        (("16-mixed", {"init_scale": -1.0}), r"FSDPPrecision\(scaler=.*init_scale must be positive"),
        (("16mixed",), 'did you mean "16-mixed"'),
        (("params=float64,compute=bfloat16",), "float64"),
        (("32-true; *.norm: 64-true",), "applies no exceptions"),
    ):
        with pytest.raises(ValueError, match=message):
            FSDPPrecision(*arguments)  # type: ignore[arg-type]


def by_hand(mode: str, steps: int) -> list[float]:
    """The README's loop, in the problem of core's curves."""
    dist.init_process_group("gloo")
    rank, world_size, problem = dist.get_rank(), dist.get_world_size(), Problem()
    precision = FSDPPrecision(mode)
    model: Any = precision.convert_module(problem.model())
    for block in model.blocks:
        fully_shard(block, mp_policy=precision.setup_mixed_precision_policy())
    fully_shard(model, mp_policy=precision.setup_mixed_precision_policy())
    optimizer = sgd(model.parameters())
    precision.register_optimizers(optimizer)

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        with precision.forward_context():
            return precision.convert_output(model(precision.convert_input(tokens)))

    curve = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = problem.loss(forward, problem.batch(step % BATCHES).chunk(world_size)[rank])
        precision.pre_backward(loss, model).backward()
        precision.optimizer_step(optimizer, model, None)
        curve.append(loss.item())
    return curve


@pytest.mark.parametrize("steps", [20, pytest.param(50, marks=pytest.mark.full)])
@pytest.mark.parametrize("mode", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_a_hand_written_loop_trains_as_one_device_does(mode: str, steps: int) -> None:
    alone = train(Fabric(accelerator="cpu", precision=mode), steps=steps)
    assert curve_distance(mean_curve(run_in_ranks(2, by_hand, mode, steps)), alone) <= loss_bound(mode, steps)


def test_it_needs_no_strategy_of_ours() -> None:
    fabric = Fabric(accelerator="cpu", precision=FSDPPrecision("bf16-mixed"))  # one device
    model = fabric.setup(nn.Linear(2, 2))
    assert model(torch.ones(1, 2)).dtype is torch.float32


def resolved() -> list[str]:
    fabrics = [Fabric(accelerator="cpu", strategy="fsdp", precision=mode) for mode in ("64-true", "bf16-mixed")]
    fabrics.append(Fabric(accelerator="cpu", strategy=FSDPStrategy(), precision=DoublePrecision()))
    return [type(fabric.precision_plugin).__name__ for fabric in fabrics]


def test_strings_resolve_to_it_under_the_strategy_only() -> None:
    assert run_in_ranks(1, resolved) == [["FSDPPrecision", "FSDPPrecision", "DoublePrecision"]]
    assert type(Fabric(accelerator="cpu", precision="bf16-mixed").precision_plugin).__name__ == "MixedPrecision"


@pytest.mark.parametrize("mode", MODES)
def test_the_support_table_has_a_row_for_every_mode(mode: str) -> None:
    alone, sharded = supports(mode, "cpu"), supports(mode, "cpu", "fsdp")
    assert sharded and (sharded.level, sharded.reason) == (alone.level, alone.reason)
    assert not supports(mode, "mps", "fsdp")
