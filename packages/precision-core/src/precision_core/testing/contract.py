"""The contracts: test classes that the tests of every plugin and every strategy inherit.

class TestKahan(PrecisionContract):
    def make_precision(self):
        return KahanPrecision()

class TestRing(StrategyContract):
    def make_strategy(self):
        return RingStrategy()

A subclass overrides the `make_...` methods, and a test only with `xfail(reason=...)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from precision_core import MODES, Fabric, Precision, SingleDeviceStrategy, Strategy
from precision_core.testing import checks_curve, checks_hooks, checks_loop, checks_setup, checks_state
from precision_core.testing.net import Net
from precision_core.testing.problem import train

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.15}


class Contract:
    """What both contracts require of a `Fabric`. Override `make_...`, and `run` for a strategy of several processes."""

    accelerator = "cpu"
    learning_rate = 0.05

    def make_fabric(self) -> Fabric:
        """Returns a new fabric with a new plugin and a new strategy."""
        raise NotImplementedError

    def make_model(self, seed: int = 0) -> Net:
        """Returns the model to train, float32, not yet converted."""
        return Net(seed)

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """Returns the optimizer of a model that is not set up yet."""
        return SGD(model.parameters(), lr=self.learning_rate, momentum=0.9)

    def run(self, check: Callable[..., None], *args: Any) -> None:
        """Runs `check(self, *args)`. Override it to run the same in every rank."""
        check(self, *args)

    def values(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns copies of the parameters that train, by name: unsharded, in float64."""
        return {
            name: getattr(param, "full_tensor", lambda param=param: param)().detach().double().clone()
            for name, param in model.named_parameters()
            if param.requires_grad
        }

    @property
    def tolerance(self) -> float:
        """The largest relative difference between gradients of the same step computed in two ways."""
        policy = self.make_fabric().precision_plugin.policy
        return max(_TOLERANCES[dtype] for dtype in (policy.params, policy.compute))

    def setup(self, seed: int = 0) -> tuple[Fabric, Net, Optimizer]:
        """Returns a new fabric with a model and an optimizer that it has set up."""
        fabric, model = self.make_fabric(), self.make_model(seed)
        optimizer = self.make_optimizer(model)
        fabric.setup(model, optimizer)
        return fabric, model, optimizer

    # ---------------------------------------------------------------- set-up

    def test_setup_returns_the_very_objects(self) -> None:
        self.run(checks_setup.setup_returns_the_very_objects)

    def test_copies_of_a_model_are_complete(self) -> None:
        self.run(checks_setup.copies_of_a_model_are_complete)

    def test_conversion_keeps_flags_ties_and_hooks(self) -> None:
        self.run(checks_setup.conversion_keeps_flags_ties_and_hooks)

    def test_an_optimizer_made_before_setup_trains_the_parameters_in_use(self) -> None:
        self.run(checks_setup.an_optimizer_made_before_setup_trains_the_parameters_in_use)

    def test_inputs_reach_forward_as_the_mode_says(self) -> None:
        self.run(checks_setup.inputs_reach_forward_as_the_mode_says)

    def test_every_stage_has_its_dtype(self) -> None:
        self.run(checks_setup.every_stage_has_its_dtype)

    def test_evaluation_returns_the_output_dtype(self) -> None:
        self.run(checks_setup.evaluation_returns_the_output_dtype)

    def test_nothing_leaks_out_of_forward(self) -> None:
        self.run(checks_setup.nothing_leaks_out_of_forward)

    # ---------------------------------------------------------------- the loop

    def test_it_learns(self) -> None:
        self.run(checks_loop.it_learns)

    def test_the_manual_autocast_loop_learns(self) -> None:
        self.run(checks_loop.the_manual_autocast_loop_learns)

    def test_accumulation_adds_up(self) -> None:
        self.run(checks_loop.accumulation_adds_up)

    def test_clipping_returns_the_unscaled_norm_and_bounds_the_step(self) -> None:
        self.run(checks_loop.clipping_returns_the_unscaled_norm_and_bounds_the_step)

    def test_clipping_by_value_bounds_every_gradient(self) -> None:
        self.run(checks_loop.clipping_by_value_bounds_every_gradient)

    def test_two_optimizers_step_like_one(self) -> None:
        self.run(checks_loop.two_optimizers_step_like_one)

    def test_an_overflow_is_skipped_and_reported(self) -> None:
        self.run(checks_loop.an_overflow_is_skipped_and_reported)

    # ---------------------------------------------------------------- state

    def test_the_precisions_state_is_saved_and_loaded_by_hand(self, tmp_path: Path) -> None:
        self.run(checks_state.the_precisions_state_is_saved_and_loaded_by_hand, tmp_path)

    def test_resuming_is_bit_exact(self, tmp_path: Path) -> None:
        self.run(checks_state.resuming_is_bit_exact, tmp_path)

    def test_the_precisions_state_survives_a_round_trip(self, tmp_path: Path) -> None:
        self.run(checks_state.the_precisions_state_survives_a_round_trip, tmp_path)

    def test_an_invalid_state_is_refused_and_changes_nothing(self) -> None:
        self.run(checks_state.an_invalid_state_is_refused_and_changes_nothing)


class PrecisionContract(Contract):
    """What every plugin must do, alone in a hand-written loop and under `Fabric` on one device."""

    def make_precision(self) -> Precision:
        """Returns a new plugin."""
        raise NotImplementedError

    def make_fabric(self) -> Fabric:
        return Fabric(accelerator=self.accelerator, precision=self.make_precision())

    def test_hooks_run_in_order(self) -> None:
        self.run(checks_hooks.hooks_run_in_order)

    def test_a_loop_by_hand_equals_fabric(self) -> None:
        self.run(checks_hooks.a_loop_by_hand_equals_fabric)

    def test_gradients_are_unscaled_once_they_are_asked_for(self) -> None:
        self.run(checks_hooks.gradients_are_unscaled_once_they_are_asked_for)

    def test_a_step_returns_the_closures_unscaled_loss(self) -> None:
        self.run(checks_hooks.a_step_returns_the_closures_unscaled_loss)

    def test_conversion_leaves_a_report(self) -> None:
        self.run(checks_hooks.conversion_leaves_a_report)

    def test_teardown_gives_the_model_back(self) -> None:
        self.run(checks_hooks.teardown_gives_the_model_back)


class StrategyContract(Contract):
    """What every strategy must do, in each of core's modes."""

    modes: tuple[Any, ...] = tuple(MODES)
    """Mode strings; `pytest.param("64-true", marks=...)` marks a mode."""
    mode: str

    def make_strategy(self) -> Strategy:
        """Returns a new strategy."""
        raise NotImplementedError

    def make_fabric(self) -> Fabric:
        return Fabric(accelerator=self.accelerator, strategy=self.make_strategy(), precision=self.mode)

    def global_curve(self, fabric: Fabric, losses: list[float]) -> list[float]:
        """Returns the losses of the global batch, the mean of all ranks'."""
        mean: list[float] = fabric.all_reduce(torch.tensor(losses, dtype=torch.float64)).tolist()
        return mean

    def reference_curve(self, steps: int) -> list[float]:
        """Returns one device's losses on the global batches; override it for policies with master weights."""
        alone = Fabric(self.accelerator, SingleDeviceStrategy(self.accelerator), precision=self.mode)
        return train(alone, steps=steps, rank=0, world_size=1)

    def test_the_curve_is_that_of_one_device(self) -> None:
        self.run(checks_curve.the_curve_is_that_of_one_device)

    @pytest.fixture(autouse=True)
    def _choose_mode(self, request: pytest.FixtureRequest) -> None:
        self.mode = request.param

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Runs each test in each of `modes`; those of `_IN_ONE_MODE` in one, which converts the model."""
        modes: Sequence[Any] = self.modes
        if preferred := _IN_ONE_MODE.get(metafunc.function.__name__):
            unmarked = [mode for mode in modes if isinstance(mode, str)]
            modes = [preferred if preferred in unmarked else [*unmarked, *modes][0]]
        metafunc.parametrize("_choose_mode", modes, indirect=True, ids=str)


# Tests that do not depend on the dtype, and their mode if the strategy has it; 16-mixed has a scaler's state.
_IN_ONE_MODE = {
    "test_setup_returns_the_very_objects": "bf16-true",
    "test_copies_of_a_model_are_complete": "bf16-true",
    "test_conversion_keeps_flags_ties_and_hooks": "bf16-true",
    "test_an_optimizer_made_before_setup_trains_the_parameters_in_use": "bf16-true",
    "test_nothing_leaks_out_of_forward": "bf16-true",
    "test_the_precisions_state_is_saved_and_loaded_by_hand": "16-mixed",
    "test_an_invalid_state_is_refused_and_changes_nothing": "16-mixed",
}
