"""Each pair of plugin and strategy is decided at construction, with the reason and the way out."""

from __future__ import annotations

import pytest
import torch

from precision_core import MODES, Fabric, MixedPrecision, Precision, SingleDeviceStrategy, Strategy
from precision_core.strategies import Group
from precision_core.support.resolve import check_composition, refusal, resolve_precision


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_core_runs_on_one_cpu(mode: str) -> None:
    strategy = SingleDeviceStrategy("cpu")
    assert refusal(resolve_precision(mode, strategy), strategy) is None


def test_a_plugin_for_another_device_is_refused_with_the_call_that_is_right() -> None:
    with pytest.raises(ValueError) as error:
        Fabric(accelerator="cpu", precision=MixedPrecision("bf16-mixed"))
    assert str(error.value) == (
        'precision="bf16-mixed" (MixedPrecision) cannot run under SingleDeviceStrategy on cpu: it was made for '
        "'cuda': pass MixedPrecision('bf16-mixed', device=\"cpu\"), or the mode as a string [cannot-run-here]"
    )


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="is about a machine without MPS")
def test_a_device_that_is_missing_is_refused() -> None:
    assert refusal(Precision(), SingleDeviceStrategy("mps")) == "torch finds no mps device here"


def test_a_device_that_core_knows_nothing_of_is_the_strategys_business() -> None:
    assert refusal(Precision(), SingleDeviceStrategy("meta")) is None


class Loner(Precision):
    def refuses(self, strategy: Strategy) -> str | None:
        return None if strategy.group.world_size == 1 else "it keeps one copy of its state: use devices=1"


class Crowd(Strategy):
    name = "crowd"
    asked: Precision | None = None

    def __init__(self) -> None:
        self.group = Group()
        self.group.world_size = 2

    def refuses(self, precision: Precision) -> str | None:
        self.asked = precision
        return "it takes true modes only: pass 32-true" if precision.policy.mixed else None


def test_the_plugin_is_asked_first_then_the_strategy() -> None:
    crowd = Crowd()
    with pytest.raises(ValueError, match=r'"32-true" \(Loner\) cannot run under Crowd on cpu: it keeps one copy'):
        Fabric(accelerator="cpu", precision=Loner(), strategy=crowd)
    assert crowd.asked is None
    assert refusal(Loner(), SingleDeviceStrategy()) is None
    with pytest.raises(ValueError, match="cannot run under Crowd on cpu: it takes true modes only: pass 32-true"):
        Fabric(accelerator="cpu", precision="bf16-mixed", strategy=crowd)
    check_composition(Precision(), crowd)


def test_a_strategy_may_bring_its_own_plugin_for_a_mode_of_core_but_an_object_wins() -> None:
    class Native(Precision):
        pass

    class Engine(Strategy):
        def make_precision(self, policy: object) -> Precision:
            return Native(policy=policy)  # type: ignore[arg-type]

    assert type(Fabric(accelerator="cpu", precision="32-true", strategy=Engine()).precision_plugin) is Native
    given = Precision()
    assert Fabric(accelerator="cpu", precision=given, strategy=Engine()).precision_plugin is given
