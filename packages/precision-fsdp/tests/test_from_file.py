"""Models that a file fills: nothing is drawn for them, each rank takes its shards, and none runs without its values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precision_core import Fabric
from precision_core.testing import run_in_ranks
from precision_fsdp import FSDPStrategy


class Positions(nn.Module):
    """Has a table that no file has."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.empty(6), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.table = torch.arange(6) / 5

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.positions = Positions()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)) for _ in range(2))
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.positions(self.embedding(ids))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def values(module: nn.Module) -> dict[str, Tensor]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {
        name: (each.full_tensor() if hasattr(each, "full_tensor") else each).detach().clone()
        for name, each in tensors.items()
    }


def empty(fabric: Fabric, kind: Any = Tied) -> nn.Module:
    with fabric.init_module(empty_init=True):
        model = kind()
    own = torch.get_rng_state()
    model = fabric.setup(model)
    assert torch.equal(torch.get_rng_state(), own)  # nothing was drawn
    return model


def filled(folder: Path, mode: str, by: str) -> None:
    fabric = Fabric("cpu", strategy="fsdp", precision=mode)
    torch.manual_seed(1)
    wanted = fabric.setup(Tied())
    wanted(torch.arange(7))  # statistics
    if by == "load":
        fabric.save(folder / "c", {"model": wanted})
    else:
        fabric.save_module(folder / "m.safetensors", wanted)
    torch.manual_seed(fabric.global_rank)
    model: Any = empty(fabric)
    names = {name: value for name, value in values(model).items() if value.is_floating_point()}
    assert all(value.isnan().all() for name, value in names.items() if name != "positions.table")
    with pytest.raises(
        RuntimeError, match=r"^embedding\.weight, blocks\.0\.0\.weight, .* and 10 more have no values: the model"
    ):
        model(torch.arange(7))
    if by == "load":
        fabric.load(folder / "c", {"model": model})
    else:
        fabric.load_module(folder / "m.safetensors", model)
    assert all(torch.equal(value, values(wanted)[name]) for name, value in values(model).items())
    assert model.head.weight is model.embedding.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup_optimizers(optimizer)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(torch.arange(7)), torch.arange(7).flip(0))
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("mode", "by"), [("32-true", "load_module"), ("bf16-mixed", "load_module"), ("32-true", "load")]
)
def test_a_file_fills_the_shards_and_nothing_is_drawn_before(mode: str, by: str, tmp_path: Path) -> None:
    run_in_ranks(2, filled, tmp_path, mode, by)


def in_part(folder: Path) -> str:
    fabric = Fabric("cpu", strategy="fsdp")
    fabric.save_module(folder / "m.safetensors", fabric.setup(nn.Sequential(nn.Linear(3, 3))))
    model = empty(fabric, lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    fabric.load_module(folder / "m.safetensors", model, strict=False)
    with pytest.raises(RuntimeError) as error:
        model(torch.ones(1, 3))
    with torch.no_grad():
        model[1].weight.fill_(1.0)  # type: ignore[index,operator,union-attr]
        model[1].bias.fill_(2.0)  # type: ignore[index,operator,union-attr]
    assert model(torch.ones(1, 3)).isfinite().all()
    return str(error.value)


def test_what_the_file_lacks_is_named_before_the_first_forward(tmp_path: Path) -> None:
    for message in run_in_ranks(2, in_part, tmp_path):
        assert message.startswith(
            "1.weight, 1.bias have no values: the model was built in fabric.init_module(empty_init"
        )


class Around(nn.Module):
    """Sets its child's values beside its own table, as a model's own initialisation does."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("table", torch.empty(3), persistent=False)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.layer.weight, 0.25)
        nn.init.zeros_(self.layer.bias)
        self.table = torch.ones(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.table


def drawn_around() -> dict[str, Tensor]:
    fabric = Fabric("cpu", strategy="fsdp")
    with fabric.init_module(empty_init=True):
        model = Around()
    return values(fabric.setup(model))


def test_what_shares_a_reset_with_a_buffer_that_no_file_has_is_initialised_as_ever() -> None:
    for found in run_in_ranks(2, drawn_around):
        assert found["layer.weight"].eq(0.25).all() and found["table"].eq(1.0).all()


def nothing_sets_the_table() -> str:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.register_buffer("table", torch.arange(3), persistent=False)

    fabric = Fabric("cpu", strategy=FSDPStrategy())
    with fabric.init_module(empty_init=True):
        model = Bare()
    with pytest.raises(ValueError) as error:
        fabric.setup(model)
    return str(error.value)


def test_a_buffer_that_neither_a_file_nor_anybody_sets_is_an_error() -> None:
    assert run_in_ranks(1, nothing_sets_the_table)[0].startswith("nothing initialises table: give their modules")


def test_strategies_that_do_not_shard_draw_all_the_same() -> None:
    fabric = Fabric("cpu")
    drawn = []
    for is_empty in (False, True):
        torch.manual_seed(3)
        with fabric.init_module(empty_init=is_empty):
            drawn.append(nn.Linear(3, 3).weight)
    assert torch.equal(*drawn)
