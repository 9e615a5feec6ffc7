"""precision.json: Fabric(precision="auto") takes what it says, for the model and the machine that were measured."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from precision_core import Fabric
from precision_core.hardware import FORMATS
from precision_core.support import Chosen, machine_fingerprint, model_fingerprint, read_chosen, write_chosen


def net(width: int = 2) -> nn.Module:
    return nn.Sequential(nn.Linear(2, width), nn.LayerNorm(width), nn.Linear(width, 1))


def chosen(**changes: Any) -> Chosen:
    values = Chosen(
        "bf16-true; 1: 32-true",
        model_fingerprint(net()),
        machine_fingerprint("cpu"),
        {"1": "rounding"},
        "precision choose mine.py:make",
    )
    return replace(values, **changes)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_auto_trains_in_what_was_chosen() -> None:
    write_chosen(chosen())
    fabric = Fabric("cpu", precision="auto")
    assert str(fabric.precision_plugin.policy) == "bf16-true; 1: 32-true"
    model = net()
    fabric.setup(model, SGD(model.parameters(), lr=0.1))
    assert [param.dtype for param in model.parameters()] == [torch.bfloat16] * 2 + [torch.float32] * 2 + [
        torch.bfloat16
    ] * 2


def test_another_file_is_read_and_what_was_written_comes_back(folder: Path) -> None:
    write_chosen(chosen(), folder / "other.json", measured={"steps": 3})
    path = str(folder / "other.json")
    assert read_chosen(f"auto:{path}") == chosen(path=path)
    assert Fabric("cpu", precision=f"auto:{path}").precision_plugin.mode.startswith("bf16-true")
    assert json.loads((folder / "other.json").read_text())["measured"] == {"steps": 3}
    assert [each.name for each in folder.iterdir()] == ["other.json"]


def test_another_model_is_refused_before_anything_is_set_up() -> None:
    write_chosen(chosen())
    model = net(3)
    fabric = Fabric("cpu", precision="auto")
    for setup in (fabric.setup, fabric.setup_module):
        with pytest.raises(ValueError, match=r"another model than this Sequential.*run precision choose mine.py:make"):
            setup(model)
    assert {param.dtype for param in model.parameters()} == {torch.float32}


def test_the_fingerprint_is_of_names_and_shapes() -> None:
    assert model_fingerprint(net()) == model_fingerprint(net().to(torch.bfloat16))
    assert model_fingerprint(net().to("meta")) == model_fingerprint(net())
    assert len({model_fingerprint(each) for each in (net(), net(3), nn.Sequential(net()), net()[0])}) == 4


def test_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    write_chosen(chosen(machine={"device": "cuda", "formats": {}}))
    with pytest.raises(
        ValueError, match=r"measured on cuda, and this run is on cpu; run precision choose mine.py:make"
    ):
        Fabric("cpu", precision="auto")
    monkeypatch.setitem(FORMATS["cpu"], torch.bfloat16, lambda: ("native", "said so"))
    write_chosen(chosen(machine=machine_fingerprint("cpu")))
    monkeypatch.setitem(FORMATS["cpu"], torch.bfloat16, lambda: ("slow", "said so"))
    with pytest.raises(ValueError, match="bfloat16 is slow here and was native there"):
        Fabric("cpu", precision="auto")


WRONG = {
    "{": "is no JSON",
    "[]": "it has list indices",
    '{"precision": "32-true"}': "it lacks 'version'",
    '{"version": 2}': "it has version 2, and this precision-core reads 1",
    '{"version": 1, "precision": "32-true"}': "it lacks 'fingerprint'",
    '{"version": 1, "precision": 32, "fingerprint": {"model": "", "machine": {"formats": {}}}}': "another type",
    '{"version": 1, "precision": "32-true", "fingerprint": {"model": "", "machine": {}}}': "without the machine's",
    '{"version": 1, "precision": "auto", "fingerprint": {"model": "", "machine": {"formats": {}}}}': "none itself",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_choice_is_refused(folder: Path, text: str) -> None:
    (folder / "precision.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(WRONG[text]) + r".*\[nothing-chosen\]"):
        Fabric("cpu", precision="auto")


def test_without_a_file_the_error_says_what_to_run() -> None:
    with pytest.raises(ValueError, match=r"cannot read gone.json \(No such file.*precision choose task.py:make"):
        Fabric("cpu", precision="auto:gone.json")


def test_a_mode_that_only_starts_like_it_is_unknown() -> None:
    with pytest.raises(ValueError, match="'autocast' is no mode"):
        Fabric("cpu", precision="autocast")
