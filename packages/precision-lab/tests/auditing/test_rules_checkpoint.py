"""Checkpoints without the scaler, or with rounded values: each with its right twin."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from precision_lab.auditing.context import audit
from precision_lab.auditing.finding import Finding

Save = Callable[[nn.Module, torch.optim.Optimizer, torch.amp.GradScaler, Path], None]


def found(save: Save, folder: Path, level: str = "warning", dtype: torch.dtype = torch.float16) -> list[Finding]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=dtype is torch.float16)
    with audit(model, optimizer) as report:
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = nn.functional.cross_entropy(model(torch.randn(4, 8)), torch.tensor([0, 1, 0, 1]))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        save(model, optimizer, scaler, folder)
    return report.at(level)


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 1, "lr": 0.01}


# ---------------------------------------------------------------- the scaler


def without(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, folder: Path) -> None:
    torch.save(states(model, optimizer), folder / "last.pt")  # here


def nested(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, folder: Path) -> None:
    with open(folder / "last.ckpt", "wb") as file:
        torch.save({"state": [states(model, optimizer)]}, file)  # here


def pickled(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, folder: Path) -> None:
    with open(folder / "last.pkl", "wb") as file:
        pickle.dump(states(model, optimizer), file)  # here


def of_a_class(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, folder: Path) -> None:
    torch.save(SimpleNamespace(**states(model, optimizer)), folder / "last.pt")  # here


@pytest.mark.parametrize("save", [without, nested, pickled, of_a_class], ids=lambda save: save.__name__)
def test_a_checkpoint_without_the_scaler_is_found(save: Save, tmp_path: Path) -> None:
    (finding,) = found(save, tmp_path)
    assert (finding.code, finding.level) == ("scaler-not-saved", "warning")
    assert "last." in finding.what
    assert finding.line is not None
    assert finding.line.text.endswith("# here")


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_folder_of_shards_without_the_scaler_is_found(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    def save(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, folder: Path) -> None:
        dcp.save(states(model, optimizer), checkpoint_id=folder / "last.dcp", no_dist=True)  # here

    (finding,) = found(save, tmp_path)
    assert finding.code == "scaler-not-saved"
    assert "last.dcp" in finding.what
    assert finding.line is not None
    assert finding.line.text.endswith("# here")


def together(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, folder: Path) -> None:
    torch.save({**states(model, optimizer), "scaler": scaler.state_dict()}, folder / "last.pt")


def beside(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, folder: Path) -> None:
    torch.save(states(model, optimizer), folder / "last.pt")
    torch.save(scaler.state_dict(), folder / "scaler.pt")


def scale_alone(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, folder: Path) -> None:
    torch.save({**states(model, optimizer), "loss_scale": scaler.get_scale()}, folder / "last.pt")


def weights(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, folder: Path) -> None:
    torch.save(model.state_dict(), folder / "model.pt")


@pytest.mark.parametrize("save", [together, beside, scale_alone, weights], ids=lambda save: save.__name__)
def test_right_checkpoints_give_no_finding(save: Save, tmp_path: Path) -> None:
    assert found(save, tmp_path) == []


def test_without_a_scale_there_is_none_to_save(tmp_path: Path) -> None:
    assert found(without, tmp_path, dtype=torch.bfloat16) == []


# ---------------------------------------------------------------- the dtype


def changed(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, folder: Path) -> None:
    torch.save(model.half().state_dict(), folder / "model.pt")  # here


def cast(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, folder: Path) -> None:
    rounded = {key: value.bfloat16() for key, value in model.state_dict().items()}
    torch.save({"net": rounded, "epoch": 1}, folder / "model.pt")  # here


def state(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, folder: Path) -> None:
    values = copy.deepcopy(optimizer.state_dict())
    for each in values["state"].values():
        each["exp_avg"] = each["exp_avg"].bfloat16()
    torch.save({"optimizer": values}, folder / "model.pt")  # here


@pytest.mark.parametrize("save", [changed, cast, state], ids=lambda save: save.__name__)
def test_a_checkpoint_in_another_dtype_is_found(save: Save, tmp_path: Path) -> None:
    (finding,) = found(save, tmp_path, dtype=torch.bfloat16)
    assert (finding.code, finding.level) == ("saved-in-another-dtype", "warning")
    assert ("in float16" if save is changed else "in bfloat16") in finding.what
    assert "trained in float32" in finding.what
    assert finding.line is not None
    assert finding.line.text.endswith("# here")


def exported(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, folder: Path) -> None:
    torch.save(model.state_dict(), folder / "last.pt")
    torch.save(copy.deepcopy(model).half().state_dict(), folder / "small.pt")


def safetensors(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({key: value.bfloat16() for key, value in model.state_dict().items()}, folder / "model.safetensors")


@pytest.mark.parametrize("save", [exported, safetensors], ids=lambda save: save.__name__)
def test_an_export_is_worth_knowing_alone(save: Save, tmp_path: Path) -> None:
    if save is safetensors:
        pytest.importorskip("safetensors")
    assert found(save, tmp_path, dtype=torch.bfloat16) == []
    assert [each.code for each in found(save, tmp_path, "info", torch.bfloat16)] == ["saved-in-another-dtype"]


def test_a_wider_checkpoint_loses_nothing(tmp_path: Path) -> None:
    def save(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, folder: Path) -> None:
        torch.save(copy.deepcopy(model).double().state_dict(), folder / "model.pt")

    assert found(save, tmp_path, "info", torch.bfloat16) == []
