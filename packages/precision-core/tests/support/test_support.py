"""The support query: answers by value, and one real step for every row that speaks of this machine's devices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from precision_core import MODES, Fabric, Policy, SingleDeviceStrategy, Support, SupportRow, supports
from precision_core import hardware as formats
from precision_core.hardware import ACCELERATORS, FORMATS, is_available
from precision_core.support.discovery import how_to_install
from precision_core.support.table import read_table

Install = Callable[..., None]
HERE = [device for device in FORMATS if is_available(device)]
FORMAT = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def accelerator(device_type: str) -> str:
    return next(name for name, types in ACCELERATORS.items() if types == (device_type,))


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("mode", MODES)
def test_every_row_of_this_machine_holds_for_one_real_step(mode: str, device: str) -> None:
    [row] = [row for row in read_table([device]).rows if row.mode == mode]
    options = {"accelerator": accelerator(device), "precision": mode}
    if row.level == "no":
        with pytest.raises(ValueError):
            Fabric(**options)  # type: ignore[arg-type]
        return
    fabric = Fabric(**options)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 1))
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x, policy = torch.randn(32, 8, device=fabric.device), fabric.precision_plugin.policy
    seen = []
    model[0].register_forward_hook(lambda layer, args, output: seen.append(output.dtype))
    losses = []
    for _ in range(20):  # a loss scale may have to fall first
        optimizer.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True)).pow(2).mean()
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and not fabric.last_step_skipped
    assert seen == [policy.compute] * 20 and {param.dtype for param in model.parameters()} == {policy.params}


@pytest.mark.parametrize("mode", MODES)
def test_a_cpu_answers_for_every_mode_of_core(mode: str) -> None:
    answer = supports(mode, "cpu")
    assert isinstance(answer, Support) and answer and answer.reason and str(answer).startswith(answer.level)
    assert answer == supports(mode, torch.device("cpu"), SingleDeviceStrategy()) == supports(mode, "cpu", "auto")
    assert (answer.level, answer.reason) == formats.by_dtypes(MODES[mode], "cpu")
    if "16" not in mode:
        assert answer.level == "native"


@pytest.mark.parametrize(("mode", "same_as"), [(16, "16-mixed"), ("bf16", "bf16-mixed"), (64, "64-true")])
def test_aliases_mean_their_mode(mode: str | int, same_as: str) -> None:
    assert supports(mode, "cpu") == supports(same_as, "cpu")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("level", ["native", "emulated", "slow", "no"])
def test_a_mode_is_as_good_as_its_worst_dtype(dtype: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS["cpu"], FORMAT[dtype], lambda: (level, "said so"))
    short = {"float16": "16", "bfloat16": "bf16"}[dtype]
    policies = [f"{short}-true", f"{short}-mixed", f"32-true; head: {short}-true", f"params=float32,compute={dtype}"]
    for policy in [*policies, Policy.parse(policies[0])]:
        assert supports(policy, "cpu") == Support(level, "said so")  # type: ignore[arg-type]
    assert supports("32-true", "cpu").level == "native"
    if level == "no":
        with pytest.raises(ValueError, match=r"cannot run under SingleDeviceStrategy on cpu: said so"):
            Fabric(accelerator="cpu", precision=f"{short}-mixed")


def test_a_policy_that_nothing_runs_is_a_no_with_who_does() -> None:
    answer = supports("params=float16,scale=true", "cpu")
    assert answer.level == "no" and "(16-master)" in answer.reason and not answer
    assert supports("params=float16,master=float32,scale=false", "cpu")


@pytest.mark.parametrize(("device", "probe"), [("cuda", torch.cuda.is_available), ("gpu", torch.cuda.is_available)])
def test_a_device_that_is_missing_is_a_no(device: str, probe: Callable[[], bool]) -> None:
    if probe():
        pytest.skip("is about a machine without it")
    assert supports("32-true", device) == Support("no", "torch finds no cuda device here")


def test_a_kind_of_device_that_nobody_speaks_of_is_a_no() -> None:
    assert supports("32-true", "tpu").reason.startswith("no installed package speaks of xla devices")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bf16-mixd", "cpu"), 'precision "bf16-mixd" is unknown: core has 64-true.*did you mean "bf16-mixed"'),
        (("params=float33", "cpu"), "unknown dtype 'float33'"),
        ((None, "cpu"), "precision=None is no mode"),
        (("32-true", "quantum"), r"supports\(device='quantum'\): expected a device type such as 'cpu'"),
        (("32-true", "cpu", "ring"), 'strategy "ring" is unknown: core has auto, single_device'),
    ],
)
def test_what_nobody_knows_is_an_error(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        supports(*arguments)  # type: ignore[arg-type]


def test_what_is_known_but_not_installed_is_a_no_that_says_what_to_install() -> None:
    answer = supports("nf4", "cpu")
    assert answer == Support("no", f'precision "nf4" needs precision-bnb: {how_to_install("bnb")} [missing-package]')
    answer = supports("bf16-mixed", "cpu", "fsdp")
    assert answer == Support("no", f'strategy "fsdp" needs precision-fsdp: {how_to_install("fsdp")} [missing-package]')


ROWS = """
from precision_core import MODES, Precision, Strategy, SupportRow

class Mine(Precision):
    mode = "mine"

    def __init__(self, mode):
        super().__init__(policy="32-true")

class Ring(Strategy):
    name = "ring"

def rows():
    yield SupportRow("mine", "cpu", "emulated", "by hand")
    yield SupportRow("mine", "cpu", "no", "not in a ring", strategy="ring")
    yield SupportRow("16-true", "cpu", "no", "the ring has no float16", strategy="ring")
"""
ENTRIES = """
[precision.plugins]
mine = rows_module:Mine
silent = rows_module:Mine
[precision.strategies]
ring = rows_module:Ring
[precision.support]
mine = rows_module:rows
"""


def test_packages_add_rows_and_a_strategys_own_row_goes_first(install: Install) -> None:
    install("mine", ENTRIES, "rows_module", ROWS)
    assert supports("mine", "cpu") == Support("emulated", "by hand")
    assert supports("mine", "cpu", "ring") == Support("no", "not in a ring")
    assert supports("16-true", "cpu", "ring") == Support("no", "the ring has no float16")
    assert supports("16-true", "cpu").level in ("native", "slow")
    assert supports("32-true", "cpu", "ring").level == "native"
    assert {row.mode for row in read_table().rows} == {*MODES, "mine"}


def test_exceptions_are_looked_through(install: Install) -> None:
    install("mine", ENTRIES, "rows_module", ROWS)
    assert supports("mine; head: 32-true", "cpu") == Support("emulated", "by hand")


def test_a_mode_without_rows_is_judged_by_its_dtypes(install: Install) -> None:
    install("mine", ENTRIES, "rows_module", ROWS)
    assert supports("silent", "cpu") == supports("32-true", "cpu")


def test_a_row_with_another_level_is_refused() -> None:
    with pytest.raises(ValueError, match="level must be one of native, emulated, slow, no"):
        SupportRow("mine", "cpu", "fast", "")  # type: ignore[arg-type]


def test_one_device_is_no_strategy_of_its_own() -> None:
    with pytest.raises(ValueError, match="for one device pass strategy=None"):
        SupportRow("mine", "cpu", "native", "", strategy="single_device")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("raise OSError('no .so')", "OSError: no .so"),
        ("def rows(): return ['a row']", "expected rows of the support table, got 'a row'"),
        ("def rows(): raise KeyError('driver')", "KeyError: 'driver'"),
    ],
)
def test_rows_that_cannot_be_read_are_named_and_stop_only_what_may_be_theirs(
    source: str, problem: str, install: Install
) -> None:
    install("broken", "[precision.support]\nbroken = broken_rows:rows\n", "broken_rows", source)
    install("mine", ENTRIES.partition("[precision.support]")[0], "rows_module", ROWS)
    assert supports("32-true", "cpu").level == "native"
    table = read_table()
    assert len(table.problems) == 1 and problem in table.problems[0] and 'support "broken"' in table.problems[0]
    for arguments in (("mine", "cpu"), ("32-true", "cpu", "ring")):
        with pytest.raises(ImportError, match='support "broken"'):
            supports(*arguments)


def test_a_mode_of_core_that_a_package_claims_is_an_error(install: Install) -> None:
    install("thief", "[precision.plugins]\nbf16-mixed = a:b\n")
    with pytest.raises(ValueError, match="is claimed by precision-core and by thief"):
        supports("bf16-mixed", "cpu")


def test_a_probe_that_raises_leaves_the_other_devices_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("precision_core.hardware.is_available", lambda device_type: True)
    for dtype in FORMATS["cuda"]:
        monkeypatch.setitem(FORMATS["cuda"], dtype, lambda: 1 // 0)
    table = read_table(["cpu", "cuda"])
    assert table.problems == ["cuda: ZeroDivisionError: integer division or modulo by zero"]
    assert {row.mode for row in table.rows if row.device == "cpu"} == set(MODES)
