"""From mode to plugin: which class runs it, and whose device it takes."""

from __future__ import annotations

import pytest
import torch

from precision_core import (
    ALIASES,
    MODES,
    DoublePrecision,
    HalfPrecision,
    MixedPrecision,
    Policy,
    Precision,
    SingleDeviceStrategy,
)
from precision_core.support.resolve import resolve_precision, resolve_strategy

CLASSES = {
    "64-true": DoublePrecision,
    "32-true": Precision,
    "16-true": HalfPrecision,
    "bf16-true": HalfPrecision,
    "16-master": HalfPrecision,
    "bf16-master": HalfPrecision,
    "bf16-stochastic": HalfPrecision,
    "16-mixed": MixedPrecision,
    "bf16-mixed": MixedPrecision,
    "params=float64,output=float32": DoublePrecision,
    "params=float32,buffers=float64": Precision,
    "params=float16,buffers=float32": HalfPrecision,
    "bf16-true; head: bf16-mixed": HalfPrecision,
    "bf16-mixed; *.norm: 32-true": MixedPrecision,
    "params=float32,compute=float16,scale=false": MixedPrecision,
}


@pytest.mark.parametrize("mode", [*CLASSES, *ALIASES])
def test_every_mode_has_its_plugin(mode: str | int) -> None:
    for spelling in (mode, Policy.parse(mode)):
        plugin = resolve_precision(spelling, SingleDeviceStrategy())
        assert type(plugin) is CLASSES[ALIASES.get(mode, mode)]  # type: ignore[index,arg-type]
        assert plugin.policy == Policy.parse(mode)


def test_no_mode_is_missing_above() -> None:
    assert MODES.keys() <= CLASSES.keys()


def test_a_plugin_is_used_as_it_is_and_mixed_takes_the_device() -> None:
    plugin = HalfPrecision("bf16-true", buffers="float32")
    assert resolve_precision(plugin, SingleDeviceStrategy()) is plugin
    mixed = resolve_precision("bf16-mixed", SingleDeviceStrategy())
    assert isinstance(mixed, MixedPrecision) and mixed.device_type == "cpu"


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("32-true; head: 64-true", "Precision('32-true; head: 64-true'): this plugin applies no exceptions; bf16-true"),
        ("64-true; head: 32-true", "DoublePrecision('64-true; head: 32-true'): this plugin applies no exceptions"),
        ("bf16-tru", 'did you mean "bf16-true"?'),
        (None, "precision=None is no mode"),
    ],
)
def test_what_no_plugin_runs_is_refused(mode: object, message: str) -> None:
    with pytest.raises(ValueError) as error:
        resolve_precision(mode, SingleDeviceStrategy())  # type: ignore[arg-type]
    assert message in str(error.value)


def test_a_strategy_by_name_takes_the_layouts_device_and_an_object_keeps_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("precision_core.strategies.layout.choose_type", lambda accelerator: "xpu")
    monkeypatch.setattr("precision_core.strategies.layout.choose_indices", lambda devices, device_type: [1])
    for name in ("auto", "single_device", "ddp"):
        assert resolve_strategy(name, "xpu", 1, 1)[0].device == torch.device("xpu", 1)
    given = SingleDeviceStrategy("cpu")
    assert resolve_strategy(given, "auto", 1, 1)[0] is given and given.device == torch.device("cpu")
    with pytest.raises(ValueError, match=r"Fabric\(accelerator='xpu'\) got a SingleDeviceStrategy on 'cpu'"):
        resolve_strategy(given, "xpu", 1, 1)
