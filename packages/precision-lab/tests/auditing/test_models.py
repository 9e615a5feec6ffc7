"""What a model says of itself: who made it half by name, and which weights should be one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from precision_lab.auditing.models import read_model
from precision_lab.auditing.names import Names
from precision_lab.auditing.record import Record


def read(model: nn.Module) -> Record:
    record, names = Record(), Names()
    names.add(model)
    read_model(record, names, model)
    return record


@pytest.mark.parametrize(
    ("mode", "engines"),
    [("bf16-true", ["Lightning bf16-true"]), ("16-true", ["Lightning 16-true"]), ("bf16-mixed", []), ("32-true", [])],
)
@pytest.mark.parametrize("host", ["Fabric", "Trainer"])
def test_lightnings_modes_by_name(host: str, mode: str, engines: list[str]) -> None:
    model, plugin = nn.Linear(2, 2), SimpleNamespace(precision=mode)
    if host == "Fabric":
        model.__dict__["_strategy"] = SimpleNamespace(precision=plugin)
    else:
        model.__dict__["_trainer"] = SimpleNamespace(precision_plugin=plugin)
    assert read(nn.Sequential(model) if host == "none" else model).engines == engines


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_weights_are_two_also_where_one_was_rounded(dtype: torch.dtype) -> None:
    model = Language()
    assert read(model).untied == []
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone().to(dtype).float())
    assert read(model).untied == [("embed.weight", "head.weight", "equal values")]
    with torch.no_grad():
        model.head.weight[-1, -1] += 1
    assert read(model).untied == []
