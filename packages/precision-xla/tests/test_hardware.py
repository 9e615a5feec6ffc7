"""What the hardware lacks is refused with its reason, on TPUs too, of which only the name is here."""

from __future__ import annotations

import pytest
import torch

from precision_core import MODES, Fabric, MixedPrecision, Policy, supports
from precision_xla import XLAPrecision, vendor
from precision_xla.hardware import answer
from precision_xla.support import rows


def test_a_tpu_has_neither_float16_nor_float64() -> None:
    found = {mode: answer(policy, "TPU") for mode, policy in MODES.items()}
    refused = [mode for mode, (level, _) in found.items() if level == "no"]
    assert refused == ["64-true", "16-true", "16-mixed", "16-master"]
    assert found["16-mixed"][1] == "a TPU's units multiply bfloat16, not float16: use bf16-mixed or bf16-true"
    assert all(answer(policy, "CPU")[0] != "no" for policy in MODES.values())
    assert answer(Policy.parse("bf16-true; *.head: 16-true"), "TPU")[0] == "no"
    assert found["bf16-mixed"][0] == found["bf16-true"][0] == "native"


@pytest.mark.parametrize("mode", ["16-mixed", "16-true", "64-true"])
def test_fabric_refuses_it_at_construction(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vendor, "hardware", lambda: "TPU")  # the answer of a machine that has one
    monkeypatch.setattr(vendor, "device_count", lambda: 8)
    with pytest.raises(ValueError, match="cannot run under XLAStrategy on xla:0: a TPU"):
        Fabric(accelerator="tpu", strategy="xla", precision=mode)


def test_a_plugin_for_another_device_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match='it runs on XLA devices: pass strategy="xla"'):
        Fabric(accelerator="cpu", precision=XLAPrecision("bf16-mixed"))
    with pytest.raises(ValueError, match=r"MixedPrecision\('bf16-mixed', device=\"xla\"\)"):
        Fabric(accelerator="cpu", strategy="xla", precision=MixedPrecision("bf16-mixed", "cpu"))
    fabric = Fabric(accelerator="cpu", strategy="xla", precision=MixedPrecision("bf16-mixed", "xla"))
    model = fabric.setup(torch.nn.Linear(2, 2))
    assert model(torch.ones(2, device=fabric.device)).dtype is torch.float32


def test_the_support_table_knows_each_mode_on_both() -> None:
    found = rows()
    assert {(row.mode, row.device) for row in found} == {(mode, device) for mode in MODES for device in ("xla", "cpu")}
    assert supports("bf16-mixed", "cpu", "xla").level == "emulated"
    assert supports("32-true", "cpu", "xla").level == "native"
    here = supports("bf16-mixed", "tpu", "xla")
    assert not here and here.reason.startswith("there is no TPU here")
