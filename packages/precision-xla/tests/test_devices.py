"""Which devices a run gets, in which process, and every way in which it cannot have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from precision_core import Fabric
from precision_xla import XLAStrategy
from precision_xla.devices import plan

HERE = Path(__file__).parent


def test_one_device_by_default() -> None:
    for devices in ("auto", 1, [0]):
        found = plan("cpu", devices, 1)
        assert (found.hardware, found.devices, found.layout.missing, found.layout.world_size) == ("CPU", 1, {}, 1)
    assert plan("auto", "auto", 1).hardware == "CPU"  # as PJRT_DEVICE says


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accelerator": "gpu"}, r"Fabric\(accelerator='gpu'\) cannot run under XLAStrategy: pass accelerator=\"tpu\""),
        ({"accelerator": "tpu"}, r"needs the XLA runtime on TPU, and this process has PJRT_DEVICE=CPU: unset PJRT"),
        ({"devices": 0}, r"Fabric\(devices=0\): expected at least 1"),
        ({"devices": "two"}, 'expected "auto", a number of devices, or a list'),
        ({"devices": True}, 'expected "auto", a number of devices, or a list'),
        ({"devices": [1]}, r"XLA's devices are taken from the first on: pass devices=1"),
        ({"devices": 2}, "has started with 1 CPU device, and stays so: call Fabric and fabric.launch"),
        ({"num_nodes": 2}, r"runs on one machine, and Fabric\(num_nodes=2\) asks for more"),
    ],
)
def test_devices_that_cannot_be_had_are_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fabric(**{"accelerator": "cpu", "strategy": "xla", **options})


def test_one_process_for_each_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"XLAStrategy\(spmd=False\): one process for each device is .*Leave spmd out"):
        XLAStrategy(spmd=False)
    assert not XLAStrategy(spmd=True).multiprocess


def test_the_vendors_own_switch_for_spmd_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_USE_SPMD", "1")
    with pytest.raises(ValueError, match=r"the environment has XLA_USE_SPMD=1, which .*Unset XLA_USE_SPMD$"):
        Fabric(accelerator="cpu", strategy="xla")
    monkeypatch.setenv("XLA_USE_SPMD", "0")
    Fabric(accelerator="cpu", strategy="xla")


def test_several_devices_are_one_in_a_process_that_was_started_with_them(run_python: Any) -> None:
    done = run_python("-m", "pytest", str(HERE / "test_spmd.py"), "-q", "-p", "no:cacheprovider", CPU_NUM_DEVICES="2")
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


SCRIPT = """
import os, sys
import torch
from precision_core import Fabric
from precision_xla import vendor

def train(fabric, add):
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    fabric.backward(model(torch.ones(4, 4, device=fabric.device)).sum())
    optimizer.step()
    return vendor.device_count() + add, vendor.sharding(model.weight), os.environ["CPU_NUM_DEVICES"]

if __name__ == "__main__":
    fabric = Fabric(accelerator="cpu", strategy="xla", devices=2)
    if sys.argv[1] == "function":
        print("function", fabric.launch(train, add=10), "CPU_NUM_DEVICES" in os.environ)
        try:
            fabric.setup(torch.nn.Linear(2, 2))
        except RuntimeError as error:
            print(error)
    else:
        fabric.launch()
        print("script", train(fabric, 20), sys.argv[1:])
"""


@pytest.mark.parametrize("how", ["script", "function"])
def test_launch_starts_a_process_with_the_vendors_variables(how: str, run_python: Any, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = run_python(str(script), how, CPU_NUM_DEVICES=None, PJRT_DEVICE=None)
    assert done.returncode == 0, done.stderr[-4000:]
    if how == "script":
        assert "script (22, '{devices=[2,1]0,1}', '2') ['script']" in done.stdout, done.stdout
    else:
        assert "function (12, '{devices=[2,1]0,1}', '2') False" in done.stdout, done.stdout
        assert (
            "this run needs a process that was started with PJRT_DEVICE=CPU CPU_NUM_DEVICES=2: call fabric.launch()"
        ) in done.stdout


def test_importing_and_making_a_plan_start_nothing(run_python: Any) -> None:
    done = run_python(
        """
        import os, sys
        import torch
        before = dict(os.environ)
        import precision_xla
        from precision_core import supports
        precision_xla.XLAPrecision("bf16-mixed"), supports("bf16-mixed", "tpu", "xla")
        assert "torch_xla" not in sys.modules and dict(os.environ) == before
        from precision_core import Fabric
        x = torch.ones(1, requires_grad=True)
        x.backward()
        try:
            Fabric(accelerator="cpu", strategy="xla")
        except RuntimeError as error:
            print(error)
        """,
        PJRT_DEVICE=None,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.startswith("a backward ran in this process before the XLA runtime started")
