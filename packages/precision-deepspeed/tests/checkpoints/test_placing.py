"""A checkpoint of one number of ranks and stage in another: every value, and the run that goes on from it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precision_core import Fabric
from precision_core.checkpoint import CheckpointError
from precision_core.testing import run_in_ranks
from precision_deepspeed import DeepSpeedPrecision, DeepSpeedStrategy, consolidated_state_dict

pytestmark = pytest.mark.filterwarnings("ignore:.*casts buffers to")

ROWS = 12


class Net(nn.Module):
    """Sizes that no number of ranks divides, a tied weight, a frozen one, a buffer, and a parameter of one number."""

    table: Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 5, bias=False)
        self.tied = nn.Linear(7, 5, bias=False)
        self.tied.weight = self.second.weight
        self.scale = nn.Parameter(torch.randn(1))
        self.frozen = nn.Parameter(torch.randn(7), requires_grad=False)
        self.register_buffer("table", torch.randn(3))
        self.register_buffer("count", torch.tensor(seed))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x) + self.frozen)
        return (self.second(x) + self.tied(x) ** 2) * self.scale


def make(stage: int, mode: str, seed: int, **options: Any) -> tuple[Fabric, Net, torch.optim.Optimizer]:
    """Returns a run with two groups, of which the second begins in the middle of the first one's parameters."""
    # With torch's scale float16 overflows here, at stage 3 not in the same steps as at the others.
    precision = DeepSpeedPrecision(mode, scaler={"init_scale": 256.0} if mode == "16-mixed" else None)
    fabric = Fabric(accelerator="cpu", strategy=DeepSpeedStrategy(stage, **options), precision=precision)
    model = Net(seed)
    groups = [
        {"params": [model.first.bias, model.second.weight, model.frozen], "lr": 0.01},
        {"params": [model.first.weight, model.scale], "lr": 0.02, "weight_decay": 0.1},
    ]
    optimizer = torch.optim.AdamW(groups, eps=1e-2)  # with a small one noise decides which way small gradients step
    fabric.setup(model, optimizer)
    return fabric, model, optimizer


def train(fabric: Fabric, model: Net, optimizer: Any, steps: range) -> None:
    for step in steps:
        rows = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        fabric.backward((model(rows.chunk(fabric.world_size)[fabric.global_rank]) - 1).pow(2).mean())
        optimizer.step()


def values(fabric: Fabric, model: Net, optimizer: Any) -> dict[str, Tensor]:
    """Returns all that a resumed run needs, by DeepSpeed's own accessors: masters, moments, parameters, buffers."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found: dict[str, Tensor] = {}
    engine: Any = fabric.strategy._engine  # type: ignore[attr-defined]
    if fabric.strategy.stage == 0:  # type: ignore[attr-defined]
        for fragment in engine._fragments():
            flat = engine._flats()[fragment.flat]
            found[fragment.name] = flat
            found |= {f"{fragment.name}.{key}": optimizer.state[flat][key] for key in ("exp_avg", "exp_avg_sq")}
    else:
        if fabric.strategy.stage < 3:  # type: ignore[attr-defined]
            # DeepSpeed does this after the first step of the first group, and forgets the others.
            engine.vendor.optimizer._hp_optimizer_states_linked = False
            engine.vendor.optimizer._lazy_init_hp_params_optimizer_state()
        for name, param in model.named_parameters():
            if param.requires_grad:
                found[name] = safe_get_full_fp32_param(param)
                for key in ("exp_avg", "exp_avg_sq"):
                    found[f"{name}.{key}"] = safe_get_full_optimizer_state(param, key)
    with fabric.strategy.gathered(model):
        found |= {f"{name} itself": value for name, value in model.state_dict().items()}
        found = {name: value.detach().clone() for name, value in found.items()}
    steps = {float(state["step"]) for state in optimizer.state.values() if "step" in state}
    found["step"] = torch.tensor(sorted(steps))
    found["steps taken"] = torch.tensor(fabric.precision_plugin.steps)
    found["groups"] = torch.tensor([[group["lr"], group["weight_decay"]] for group in optimizer.param_groups])
    return found


def save(folder: Path, stage: int, mode: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the values saved, and those after two more steps."""
    fabric, model, optimizer = make(stage, mode, seed=0)
    train(fabric, model, optimizer, range(3))
    for group in optimizer.param_groups:
        group["lr"] *= 0.5  # as a scheduler does: what is saved is not what the loading run begins with
    fabric.save(folder / f"{stage}", {"model": model, "optimizer": optimizer, "step": 3})
    saved = values(fabric, model, optimizer)
    train(fabric, model, optimizer, range(3, 5))
    return saved, values(fabric, model, optimizer)


def load(folder: Path, stages: list[int], stage: int, mode: str, options: dict[str, Any]) -> list[Any]:
    """Returns for each of `stages`, which wrote the folders, what `save` returns; the first one is loaded twice."""
    found = []
    for number, source in enumerate(stages):
        fabric, model, optimizer = make(stage, mode, seed=1, **options)
        state = {"model": model, "optimizer": optimizer, "step": 0}
        if number == 0:
            train(fabric, model, optimizer, range(2))
            fabric.load(folder / f"{source}", state)
        fabric.load(folder / f"{source}", state)
        assert state["step"] == 3
        loaded, said = values(fabric, model, optimizer), fabric.strategy.converted  # type: ignore[attr-defined]
        train(fabric, model, optimizer, range(3, 5))
        found.append((loaded, values(fabric, model, optimizer), said))
        fabric.strategy._engine.destroy()  # type: ignore[attr-defined]
    return found


FAST = [  # each stage from the others, each mode, to more ranks, to fewer, and to as many
    ("32-true", 3, 2, 0, {}),
    ("16-mixed", 2, 3, 1, {}),
    ("16-mixed", 2, 2, 2, {"offload_optimizer": True}),
    ("bf16-true", 1, 2, 3, {}),
    ("32-true", 3, 1, 3, {"config": {"zero_optimization": {"sub_group_size": 20}}}),
]
FULL = [
    *[("bf16-true", 2, 1, stage, {}) for stage in (0, 2, 3)],
    *[("bf16-true", 1, 2, stage, {}) for stage in (0, 1)],
    ("16-mixed", 2, 3, 3, {}),
    ("32-true", 3, 2, 3, {"offload_optimizer": True, "offload_parameters": True}),
]


@pytest.mark.parametrize(
    ("mode", "ranks", "other_ranks", "stage", "options"),
    [*FAST, *(pytest.param(*case, marks=pytest.mark.full) for case in FULL)],
)
def test_every_value_arrives(
    tmp_path: Path, mode: str, ranks: int, other_ranks: int, stage: int, options: dict[str, Any]
) -> None:
    stages = [source for source in (0, 1, 2, 3) if (source, ranks) != (stage, other_ranks)]
    references = {source: run_in_ranks(ranks, save, tmp_path, source, mode)[0] for source in stages}
    for folder in tmp_path.iterdir():
        folder.chmod(0o555)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for results in run_in_ranks(other_ranks, load, tmp_path, stages, stage, mode, options):
        for source, (loaded, trained, said) in zip(stages, results, strict=True):
            saved, continued = references[source]
            assert loaded.keys() == saved.keys()
            for name, value in saved.items():
                assert torch.equal(loaded[name], value), (source, name)
            for name, value in continued.items():  # sums over other numbers of ranks round differently
                error = (trained[name].double() - value.double()).abs().max()
                assert error <= (2e-3 if "16" in mode else 1e-5) * (1 + value.abs().max()), (source, name)
            expected = [(ranks, other_ranks, "world_size"), (source, stage, "stage")]
            assert said == ", ".join(f"{what} {old} -> {new}" for old, new, what in expected if old != new)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert sorted(os.listdir(tmp_path)) == sorted(map(str, stages))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_export_is_what_deepspeeds_own_tool_makes(tmp_path: Path, stage: int) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    run_in_ranks(2, save, tmp_path, stage, "bf16-true")
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path), tag=str(stage))
    mine = consolidated_state_dict(tmp_path / str(stage))
    assert mine.keys() - {"frozen"} == theirs.keys() - {"frozen"}  # which theirs leaves out at stage 1
    for name, value in mine.items():
        if name not in theirs:
            continue
        assert torch.equal(value.float(), theirs[name].float()), name


def refused(folder: Path, stage: int, mode: str, words: str, config: dict[str, Any] | None = None) -> None:
    fabric, model, optimizer = make(stage, mode, seed=1, config=config)
    train(fabric, model, optimizer, range(1))
    before = values(fabric, model, optimizer)
    with pytest.raises(CheckpointError, match=words):
        fabric.load(folder, {"model": model, "optimizer": optimizer, "step": 0})
    after = values(fabric, model, optimizer)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_cannot_be_converted_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    run_in_ranks(2, save, tmp_path, 2, "bf16-mixed")
    run_in_ranks(1, refused, tmp_path / "2", 3, "32-true", "mode='bf16-mixed'.*mode='32-true'")
    (tmp_path / "2" / "manifest.json").unlink()
    run_in_ranks(1, refused, tmp_path / "2", 3, "bf16-mixed", "its save was not finished")
