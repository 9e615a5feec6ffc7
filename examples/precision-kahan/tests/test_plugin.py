"""The plugin: what it is asked for by, what it refuses, what it says, and its state."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from precision_kahan import KahanPrecision
from precision_kahan.support import rows
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from precision_core import Fabric, HalfPrecision, SingleDeviceStrategy, Strategy, supports

LR = 1e-4


def make_model(seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    for param in model.parameters():
        nn.init.normal_(param, generator=generator)
    return model


def step(plugin: HalfPrecision, model: nn.Module, optimizer: Any, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
    plugin.optimizer_step(optimizer, model, None)


def trained(steps: int = 3) -> tuple[KahanPrecision, nn.Module, SGD]:
    plugin, model = KahanPrecision(), make_model()
    plugin.convert_module(model)
    optimizer = SGD(model.parameters(), lr=LR)
    for seed in range(steps):
        step(plugin, model, optimizer, seed)
    return plugin, model, optimizer


def trained_state() -> dict[str, Any]:
    plugin, _model, _ = trained()
    return plugin.state_dict()


# ---------------------------------------------------------------- the mode


def test_fabric_finds_it_by_its_entry_point() -> None:
    fabric = Fabric(accelerator="cpu", precision="bf16-kahan")
    assert type(fabric.precision_plugin) is KahanPrecision and fabric.precision_plugin.mode == "bf16-kahan"


@pytest.mark.parametrize("mode", ["bf16-true", "32-true", "bf16-kahan2", "kahan", "bf16", ""])
def test_other_modes_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match='expected "bf16-kahan"'):
        KahanPrecision(mode)


def test_modes_are_spelled_as_they_are_asked_for() -> None:
    for mode in ("bf16-kahan", "bf16-kahan; 1: 32-true"):
        assert KahanPrecision(mode).mode == KahanPrecision(KahanPrecision(mode).mode).mode == mode
    assert KahanPrecision(buffers="float32").mode == "bf16-kahan"


class Ring(Strategy):
    name = "ring"


def test_it_runs_on_one_device_only() -> None:
    assert KahanPrecision().refuses(SingleDeviceStrategy("cpu")) is None
    with pytest.raises(ValueError, match="bf16-kahan runs on one device"):
        Fabric(accelerator="cpu", strategy=Ring(), precision=KahanPrecision())


def test_the_support_table_answers_as_for_bf16_true() -> None:
    assert supports("bf16-kahan", "cpu") == supports("bf16-true", "cpu")
    assert {row.mode for row in rows()} == {"bf16-kahan"} and {row.level for row in rows() if row.strategy} <= {"no"}


# ---------------------------------------------------------------- set-up


def test_the_report_says_what_it_costs() -> None:
    plugin, model = KahanPrecision(), make_model()
    plugin.convert_module(model)
    size = sum(param.nbytes for param in model.parameters())
    assert plugin.report.notes == (
        f"what rounding takes from parameters is kept beside them in bfloat16: up to {size:,} bytes more",
    )
    lost = plugin.state_dict()["compensation"]
    assert sum(value.nbytes for value in lost.values()) == size == plugin.report.bytes_before // 2


def test_only_what_trains_is_compensated() -> None:
    plugin, model = KahanPrecision(), make_model()
    model[0].requires_grad_(False)
    plugin.convert_module(model)
    assert set(plugin.state_dict()["compensation"]) == {"0.1.weight", "0.1.bias"}


def test_converting_again_changes_nothing() -> None:
    plugin, model, _ = trained()
    before = plugin.state_dict()["compensation"]
    plugin.convert_module(model)
    assert all(lost is before[name] for name, lost in plugin.state_dict()["compensation"].items())


def test_lazy_and_meta_parameters() -> None:
    plugin = KahanPrecision()
    model = plugin.convert_module(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2, device="meta")))
    assert plugin.state_dict()["compensation"] == {}
    model[1] = nn.Linear(3, 2, dtype=torch.bfloat16)
    optimizer = SGD(model.parameters(), lr=LR)
    model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    plugin.optimizer_step(optimizer, model, None)
    assert set(plugin.state_dict()["compensation"]) == {f"0.{name}" for name, _ in model.named_parameters()}


def test_copies_and_pickles_of_the_model_hold_no_compensation() -> None:
    plugin, model, _ = trained()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(
            torch.equal(mine, theirs) for mine, theirs in zip(other.parameters(), model.parameters(), strict=True)
        )
        assert not any(vars(param) for param in other.parameters())
    assert len(plugin.state_dict()["compensation"]) == 4
    del model, other
    gc.collect()
    assert plugin.state_dict()["compensation"] == {}  # it keeps no model alive


# ---------------------------------------------------------------- values that someone else writes


@torch.no_grad()
def _fill(param: nn.Parameter) -> None:
    param.fill_(1.0)


@pytest.mark.parametrize(
    "write", [_fill, lambda param: nn.init.constant_(param, 1.0), lambda param: param.detach().fill_(1.0)]
)
def test_what_someone_else_writes_has_no_compensation(write: Callable[[nn.Parameter], Any]) -> None:
    plugin, model, optimizer = trained()
    write(model[0].weight)
    assert "0.0.weight" not in plugin.state_dict()["compensation"]
    step(plugin, model, optimizer, 7)
    expected = (1 - LR * model[0].weight.grad.double()).float()
    lost = plugin.state_dict()["compensation"]["0.0.weight"]
    assert (model[0].weight.float() + lost.float() - expected).abs().max() < 2**-17


def test_loading_a_model_drops_its_compensation() -> None:
    plugin, model, _ = trained()
    model.load_state_dict(model.state_dict())
    assert plugin.state_dict()["compensation"] == {}


def test_writes_through_data_move_by_half_a_spacing_at_most() -> None:
    plugin, model, optimizer = trained()
    model[0].weight.data.fill_(1e-6)
    model[0].weight.data[0, 0] = 0
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    before = model[0].weight.detach().clone()
    plugin.optimizer_step(optimizer, model, None)
    assert torch.equal(model[0].weight, before)


def test_infinite_parameters_stay_infinite() -> None:
    plugin, model, optimizer = trained()
    model[0].weight.grad = torch.full_like(model[0].weight, -torch.inf)
    plugin.optimizer_step(optimizer, model, None)
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    plugin.optimizer_step(optimizer, model, None)
    assert (model[0].weight == torch.inf).all()


# ---------------------------------------------------------------- state


@pytest.mark.parametrize("convert_first", [True, False])
def test_a_run_goes_on_bit_for_bit(convert_first: bool, tmp_path: Path) -> None:
    plugin, model, optimizer = trained()
    torch.save((plugin.state_dict(), model.state_dict()), tmp_path / "state.pt")
    state, weights = torch.load(tmp_path / "state.pt", weights_only=True)
    for seed in range(3, 40):
        step(plugin, model, optimizer, seed)

    other, again = KahanPrecision(), make_model(1)
    if convert_first:
        other.convert_module(again)
        step(other, again, SGD(again.parameters(), lr=LR))
        other.load_state_dict(state)
    else:
        other.load_state_dict(state)
        other.convert_module(again)
    again.load_state_dict(weights)
    assert other.state_dict()["compensation"].keys() == state["compensation"].keys()
    rest = SGD(again.parameters(), lr=LR)
    for seed in range(3, 40):
        step(other, again, rest, seed)
    mine, theirs = other.state_dict(), plugin.state_dict()
    for name, value in theirs["compensation"].items():
        assert torch.equal(value, mine["compensation"][name])
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert mine["steps"] == theirs["steps"] == 40


def test_models_with_equal_names_keep_apart() -> None:
    plugin, models = KahanPrecision(), [make_model(0), make_model(1)]
    for model in models:
        plugin.convert_module(model)
    state = plugin.state_dict()["compensation"]
    assert len(state) == 8 and not torch.equal(state["0.0.weight"], state["1.0.weight"])
    other = KahanPrecision()
    other.load_state_dict(plugin.state_dict())
    model = make_model(2)
    other.convert_module(model)
    assert other.state_dict()["compensation"].keys() == state.keys()  # the second is still waited for


def test_a_shared_parameter_is_stored_once() -> None:
    plugin, model = KahanPrecision(), make_model()
    plugin.convert_module(model)
    plugin.convert_module(model[0])
    assert set(plugin.state_dict()["compensation"]) == {"0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias"}


class Compiled(nn.Module):
    """The names that `torch.compile(module)` gives."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


def test_names_are_those_of_the_model_before_it_was_compiled() -> None:
    plugin, model = KahanPrecision(), make_model()
    model[0] = Compiled(model[0])
    plugin.convert_module(model)
    assert "0.0.weight" in plugin.state_dict()["compensation"]


def test_a_state_without_compensation_starts_at_zero_and_says_so() -> None:
    plugin, _model, _ = trained()
    half = HalfPrecision("bf16-true")
    plugin.load_state_dict(half.state_dict())
    assert plugin.state_dict()["compensation"] == {} and plugin.steps == 0
    assert plugin.report.notes[-1] == "the state of 'bf16-true' has no compensation: it starts at zero"
    half.load_state_dict(trained_state())
    assert half.steps == 3 and half.report.notes[-1].startswith("loaded the state of 'bf16-kahan' into 'bf16-true'")


def test_compensation_of_a_float32_exception_is_left_out() -> None:
    state = trained_state()
    plugin, model = KahanPrecision("bf16-kahan; 1: 32-true"), make_model()
    plugin.convert_module(model)
    plugin.load_state_dict(state)
    assert set(plugin.state_dict()["compensation"]) == {"0.0.weight", "0.0.bias"}


def test_parameters_without_a_name_are_said_to_be_left_out() -> None:
    plugin = KahanPrecision()
    param = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    plugin.optimizer_step(AdamW([param]), None, None)
    assert plugin.state_dict()["compensation"] == {}
    assert plugin.report.notes[-1].startswith("the state leaves out the compensation of 1 parameters")


def _without(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != "compensation"}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: None,
        lambda state: [],
        _without,
        lambda state: state | {"steps": -1},
        lambda state: state | {"compensation": None},
        lambda state: state | {"compensation": {"0.0.weight": 1}},
        lambda state: state | {"compensation": {"0.0.weight": torch.zeros(8, 4)}},
        lambda state: state | {"compensation": {0: torch.zeros(8, 4, dtype=torch.bfloat16)}},
        lambda state: state | {"compensation": {"0.0.weight": torch.zeros(3, dtype=torch.bfloat16)}},
        lambda state: state | {"compensation": {"0.7.weight": torch.zeros(3, dtype=torch.bfloat16)}},
    ],
)
def test_garbage_is_refused_and_changes_nothing(spoil: Callable[[dict[str, Any]], Any]) -> None:
    plugin, _model, _ = trained()
    before = plugin.state_dict()
    with pytest.raises(ValueError):
        plugin.load_state_dict(spoil(dict(before)))
    after = plugin.state_dict()
    assert _without(after) == _without(before)
    assert all(after["compensation"][name] is value for name, value in before["compensation"].items())


def test_a_model_that_does_not_fit_what_was_loaded_is_refused() -> None:
    plugin, model = KahanPrecision(), nn.Linear(4, 2)
    plugin.load_state_dict(trained_state())
    with pytest.raises(ValueError, match=r"compensation for 0\.0\.weight, which model 0 does not have"):
        plugin.convert_module(model)
    assert model.weight.dtype is torch.float32


def test_a_checkpoint_of_fabric_holds_it(tmp_path: Path) -> None:
    def run(fabric: Fabric, model: nn.Module, optimizer: Any, seeds: range) -> Tensor:
        for seed in seeds:
            optimizer.zero_grad()
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
            fabric.backward(model(x).square().mean())
            optimizer.step()
        return torch.cat([param.detach().flatten() for param in model.parameters()])

    def start(seed: int) -> tuple[Fabric, nn.Module, Any]:
        fabric, model = Fabric(accelerator="cpu", precision="bf16-kahan"), make_model(seed)
        return fabric, *fabric.setup(model, AdamW(model.parameters(), lr=LR))

    fabric, model, optimizer = start(0)
    run(fabric, model, optimizer, range(10))
    fabric.save(tmp_path / "run.ckpt", {"model": model, "optimizer": optimizer})
    expected = run(fabric, model, optimizer, range(10, 60))
    fabric, model, optimizer = start(1)
    fabric.load(tmp_path / "run.ckpt", {"model": model, "optimizer": optimizer})
    assert torch.equal(run(fabric, model, optimizer, range(10, 60)), expected)
