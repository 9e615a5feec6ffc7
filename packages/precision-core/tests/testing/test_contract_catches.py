"""The contracts fail what is broken: one fault a plugin or strategy, and the check that must see it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precision_core import Fabric, HalfPrecision, MixedPrecision, Precision, SingleDeviceStrategy
from precision_core.testing import PrecisionContract, checks_hooks, checks_loop, checks_setup, checks_state


class Mixed16(MixedPrecision):
    def __init__(self) -> None:
        super().__init__("16-mixed", device="cpu")


class CastsIntegers(Precision):
    def convert_input(self, data: Any) -> Any:
        args, kwargs = super().convert_input(data)
        return tuple({**arg, "keep": arg["keep"].int()} for arg in args), kwargs


class KeepsInputs(HalfPrecision):
    def __init__(self) -> None:
        super().__init__("bf16-true")

    def convert_input(self, data: Any) -> Any:
        return data


class KeepsOutputs(HalfPrecision):
    def __init__(self) -> None:
        super().__init__("bf16-true")

    def convert_output(self, data: Any) -> Any:
        return data


class ForgetsAutocast(MixedPrecision):
    def __init__(self) -> None:
        super().__init__("bf16-mixed", device="cpu")

    def forward_context(self) -> Any:
        return torch.autocast("cpu", enabled=False)


class SetsDefaultDtype(Precision):
    def forward_context(self) -> Any:
        torch.set_default_dtype(torch.float64)
        return super().forward_context()


class CopiesTheModel(Precision):
    def convert_module(self, module: nn.Module) -> nn.Module:
        for block in module.blocks:  # type: ignore[union-attr]
            fresh = nn.Linear(block.up.in_features, block.up.out_features)
            fresh.load_state_dict(block.up.state_dict())
            block.up = fresh
        return super().convert_module(module)


class BreaksTies(Precision):
    def convert_module(self, module: nn.Module) -> nn.Module:
        module.head.weight = nn.Parameter(module.head.weight.detach().clone())  # type: ignore[union-attr,operator]
        return super().convert_module(module)


class WakesUp(Precision):
    def convert_module(self, module: nn.Module) -> nn.Module:
        return super().convert_module(module).train()


class LeavesScaled(Mixed16):
    def unscale_gradients(self, optimizer: Any) -> None:
        pass

    def clip_gradients(self, module: Any, optimizer: Any = None, **clip: Any) -> Tensor:
        return nn.utils.clip_grad_norm_(list(self.main_params(optimizer)), clip["max_norm"])


class StepsAnyway(Mixed16):
    def optimizer_step(self, optimizer: Any, model: Any, closure: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            for param in self.main_params(optimizer):
                param -= 1e-3
        return super().optimizer_step(optimizer, model, closure, **kwargs)


class ForgetsState(Mixed16):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "scaler": {}})


class TakesAnything(Precision):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class ScalesTheReturnedLoss(Mixed16):
    def post_backward(self, tensor: Tensor, module: Any) -> Tensor:
        return tensor


FAULTS: list[tuple[type[Precision], Callable[..., None]]] = [
    (CastsIntegers, checks_setup.inputs_reach_forward_as_the_mode_says),
    (KeepsInputs, checks_setup.inputs_reach_forward_as_the_mode_says),
    (KeepsOutputs, checks_setup.every_stage_has_its_dtype),
    (KeepsOutputs, checks_setup.evaluation_returns_the_output_dtype),
    (ForgetsAutocast, checks_setup.every_stage_has_its_dtype),
    (SetsDefaultDtype, checks_setup.nothing_leaks_out_of_forward),
    (CopiesTheModel, checks_setup.conversion_keeps_flags_ties_and_hooks),
    (BreaksTies, checks_setup.conversion_keeps_flags_ties_and_hooks),
    (WakesUp, checks_setup.conversion_keeps_flags_ties_and_hooks),
    (LeavesScaled, checks_loop.clipping_returns_the_unscaled_norm_and_bounds_the_step),
    (LeavesScaled, checks_hooks.gradients_are_unscaled_once_they_are_asked_for),
    (StepsAnyway, checks_loop.an_overflow_is_skipped_and_reported),
    (ForgetsState, checks_state.the_precisions_state_survives_a_round_trip),
    (ForgetsState, checks_state.resuming_is_bit_exact),
    (TakesAnything, checks_state.the_precisions_state_survives_a_round_trip),
    (TakesAnything, checks_state.an_invalid_state_is_refused_and_changes_nothing),
    (ScalesTheReturnedLoss, checks_hooks.a_loop_by_hand_equals_fabric),
]


@pytest.mark.parametrize(("broken", "check"), FAULTS, ids=lambda each: each.__name__)
def test_a_fault_is_seen(broken: type[Precision], check: Callable[..., None], tmp_path: Path) -> None:
    class Kit(PrecisionContract):
        def make_precision(self) -> Precision:
            return broken()

    folder = [tmp_path] if "folder" in inspect.signature(check).parameters else []
    try:
        with pytest.raises((AssertionError, pytest.fail.Exception, RuntimeError)):
            Kit().run(check, *folder)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_strategy_that_drops_a_half_of_the_accumulation_is_seen() -> None:
    class Forgetful(SingleDeviceStrategy):
        count = 0

        def backward(self, tensor: Tensor, module: Any, *args: Any, **kwargs: Any) -> None:
            self.count += 1
            super().backward(tensor * (self.count != 2), module, *args, **kwargs)

    class Kit(PrecisionContract):
        def make_fabric(self) -> Fabric:
            return Fabric(strategy=Forgetful(), precision="32-true")

    with pytest.raises(AssertionError):
        Kit().run(checks_loop.accumulation_adds_up)
