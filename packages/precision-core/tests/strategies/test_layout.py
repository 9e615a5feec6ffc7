"""Layout: what each accelerator= and devices= means here, and every error."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from precision_core import Fabric
from precision_core.hardware import ACCELERATORS, device_count, is_available
from precision_core.strategies.layout import choose_indices, choose_type, device_of

HERE = [name for name, types in ACCELERATORS.items() if any(map(is_available, types))]
MISSING = [name for name in ACCELERATORS if name not in HERE]


@pytest.mark.parametrize("devices", ["auto", 1, [0], (0,)])
def test_one_cpu(devices: Any) -> None:
    assert list(choose_indices(devices, "cpu")) == [0] and device_of("cpu", 0) == torch.device("cpu")
    assert Fabric(accelerator="cpu", devices=devices).device == torch.device("cpu")


def test_processes_share_a_cpu_but_not_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(choose_indices(3, "cpu")) == [0, 1, 2] and len(choose_indices(10**9, "cpu")) == 10**9
    assert Fabric(accelerator="cpu", devices=3).world_size == 3
    monkeypatch.setattr("precision_core.strategies.layout.device_count", lambda device_type: 4)
    assert list(choose_indices("auto", "cuda")) == [0, 1, 2, 3] and list(choose_indices([3, 1], "cuda")) == [3, 1]
    assert device_of("cuda", 3) == torch.device("cuda:3")
    with pytest.raises(ValueError, match=r"Fabric\(devices=5\): this machine has 4 cuda devices$"):
        choose_indices(5, "cuda")


def test_auto_takes_what_is_here_and_a_gpu_before_the_cpu() -> None:
    assert set(HERE) >= {"auto", "cpu"} and is_available("cpu") and device_count("cpu") == 1
    assert choose_type("auto") == ("cpu" if "gpu" not in HERE else choose_type("gpu"))
    for name in HERE:
        assert choose_type(name) in ACCELERATORS[name]


@pytest.mark.parametrize("name", [name for name in MISSING if name != "tpu"])
def test_a_missing_accelerator_is_an_error_that_says_what_is_here(name: str) -> None:
    wanted = " or ".join(ACCELERATORS[name])
    with pytest.raises(ValueError, match=f"torch finds no {wanted} device here. Here are: .*cpu") as error:
        Fabric(accelerator=name)
    assert f"Fabric(accelerator={name!r})" in str(error.value) and device_count(ACCELERATORS[name][0]) == 0


@pytest.mark.skipif("tpu" in HERE, reason="is about a machine without XLA")
def test_a_tpu_needs_its_package() -> None:
    with pytest.raises(ValueError, match=r"needs precision-xla.* pip install \./packages/precision-xla in a checkout"):
        Fabric(accelerator="tpu")


@pytest.mark.parametrize(("name", "hint"), [("gpus", '; did you mean "gpu"'), ("CPU", '"cpu"'), ("abacus", "")])
def test_an_unknown_accelerator_is_an_error(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match="allowed are cpu, gpu, cuda, mps, xpu, tpu, auto") as error:
        Fabric(accelerator=name)
    assert str(error.value).startswith(f"Fabric(accelerator={name!r})") and hint in str(error.value)


@pytest.mark.parametrize("name", [None, 3, ["cpu"], torch.device("cpu")])
def test_an_accelerator_is_a_string(name: Any) -> None:
    with pytest.raises(ValueError, match="allowed are cpu"):
        Fabric(accelerator=name)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (0, "expected at least 1"),
        (-1, "expected at least 1"),
        (True, 'expected "auto", a number of devices, or a list of device indices'),
        (1.0, 'expected "auto"'),
        (1.5, 'expected "auto"'),
        ("2", 'expected "auto"'),
        ("", 'expected "auto"'),
        (None, 'expected "auto"'),
        ([], 'expected "auto"'),
        (["0"], 'expected "auto"'),
        ([True], 'expected "auto"'),
        ({0}, 'expected "auto"'),
        ([1], "there is no cpu device 1, they are 0 to 0"),
        ([-1], "there is no cpu device -1"),
        ([0, 1], "there is no cpu device 1"),
        ([0, 0], "each may be named once"),
    ],
)
def test_devices_that_are_none_or_too_many_are_an_error(devices: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Fabric(accelerator="cpu", devices=devices)
    assert str(error.value).startswith(f"Fabric(devices={devices!r})")
