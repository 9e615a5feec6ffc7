"""Adapters around 4- and 8-bit weights, sharded over two processes: the curve is that of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from precision_core import CheckpointError, Fabric
from precision_core.testing import curve_distance, loss_bound, run_in_ranks

pytest.importorskip("precision_bnb", reason="precision-bnb is not installed here")
pytest.importorskip("precision_fsdp", reason="precision-fsdp is not installed here")

WIDTH = 64


class Adapted(nn.Module):
    """A frozen layer, and a product of rank 4 that trains beside it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs).requires_grad_(False)
        self.a = nn.Linear(inputs, 4, bias=False)
        self.b = nn.Linear(4, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.b(self.a(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = Adapted(WIDTH, 2 * WIDTH)
        self.down = Adapted(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def train(
    strategy: str, options: dict[str, Any], steps: int
) -> tuple[list[float], dict[str, tuple[torch.dtype, float]]]:
    """Returns the losses, and each packed weight's dtype and this rank's share of its elements."""
    from precision_bnb import BitsandbytesPrecision

    plugin = BitsandbytesPrecision(**options, ignore_modules={"*.a", "*.b", "head"})
    fabric = Fabric(accelerator="cpu", precision=plugin, strategy=strategy)
    torch.manual_seed(0)
    model = fabric.setup(Net())
    trainable = [param for param in model.parameters() if param.requires_grad]
    optimizer = fabric.setup_optimizers(torch.optim.SGD(trainable, lr=0.05, momentum=0.9))
    batches, losses = torch.Generator().manual_seed(1), []
    for step in range(steps):
        halves = torch.randn(8, WIDTH, generator=batches).chunk(2)
        mine = halves if fabric.world_size == 1 else halves[fabric.global_rank :][:1]
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for inputs in mine:  # one process takes them one by one, so that products are rounded alike
            loss = nn.functional.mse_loss(model(inputs), inputs[:, :8].sin()) / len(mine)
            fabric.backward(loss)
            total += loss.detach().double()
        optimizer.step()
        losses.append(fabric.all_reduce(total).item())
        if step == steps // 2:  # an evaluation on the way changes nothing
            with torch.no_grad():
                model.eval()(inputs)
            model.train()
    packed = {name: param for name, param in model.named_parameters() if name.endswith("layer.weight")}
    return losses, {name: (param.dtype, _share(param)) for name, param in packed.items()}


def _share(param: Tensor) -> float:
    return param.to_local().numel() / param.numel() if isinstance(param, DTensor) else 1.0


@pytest.mark.parametrize(
    ("options", "bound", "stored"),
    [
        ({"mode": "nf4", "dtype": torch.float32}, "32-true", torch.uint8),
        ({"mode": "nf4-dq", "dtype": torch.float32}, "32-true", torch.uint8),
        ({"mode": "int8", "dtype": torch.float32}, "32-true", torch.uint8),
        ({"mode": "nf4", "dtype": torch.bfloat16, "base": "bf16-mixed"}, "bf16-mixed", torch.uint8),
        (
            {
                "mode": {
                    "load_in_4bit": True,
                    "bnb_4bit_quant_type": "nf4",
                    "bnb_4bit_compute_dtype": torch.bfloat16,
                    "bnb_4bit_quant_storage": torch.bfloat16,
                },
                "base": "bf16-mixed",
            },
            "bf16-mixed",
            torch.bfloat16,
        ),
    ],
    ids=["nf4", "nf4-dq", "int8", "nf4 in bfloat16", "nf4 stored as bfloat16"],
)
@pytest.mark.parametrize("steps", [20, pytest.param(60, marks=pytest.mark.full)])
def test_sharded_adapters_train_as_on_one_device(
    options: dict[str, Any], bound: str, stored: torch.dtype, steps: int
) -> None:
    ((reference, _),) = run_in_ranks(1, train, "single_device", options, steps)
    for losses, packed in run_in_ranks(2, train, "fsdp", options, steps):
        assert curve_distance(losses, reference) <= loss_bound(bound, steps)
        assert len(packed) == 6
        assert {dtype for dtype, _ in packed.values()} == {stored}
        assert all(share <= 0.51 for _, share in packed.values())
    assert reference[-1] < 0.9 * reference[0]


# -------------------------------------------------------------------- files


def values(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value.clone()
        for name, value in module.state_dict().items()
    }


def made(strategy: str, seed: int) -> tuple[Fabric, nn.Module, torch.optim.Optimizer]:
    fabric = Fabric(accelerator="cpu", precision="nf4", strategy=strategy)
    torch.manual_seed(seed)
    model = fabric.setup(Net())
    trainable = [param for param in model.parameters() if param.requires_grad]
    return fabric, model, fabric.setup_optimizers(torch.optim.AdamW(trainable))


def saved(folder: Path) -> dict[str, Tensor]:
    fabric, model, optimizer = made("fsdp", seed=0)
    fabric.backward(model(torch.randn(4, WIDTH)).pow(2).mean())
    optimizer.step()
    fabric.save(folder / "checkpoint", {"model": model, "optimizer": optimizer})
    fabric.save_module(folder / "model.safetensors", model)
    return values(model)


def loaded(folder: Path, strategy: str) -> dict[str, Tensor]:
    fabric, model, optimizer = made(strategy, seed=1)
    fabric.load(folder / "checkpoint", {"model": model, "optimizer": optimizer})
    return values(model)


def loaded_into_nothing(folder: Path, strategy: str) -> dict[str, Tensor]:
    fabric = Fabric(accelerator="cpu", precision="nf4", strategy=strategy)
    with fabric.init_module():
        model = Net()
    fabric.load_module(folder / "model.safetensors", model)
    return values(fabric.setup(model))


def test_packed_shards_are_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    wanted = run_in_ranks(2, saved, tmp_path)[0]
    assert sum(value.dtype is torch.uint8 for value in wanted.values()) == 19
    for load in (loaded, loaded_into_nothing):
        for ranks, strategy in ((2, "fsdp"), (3, "fsdp"), (1, "single_device")):
            for found in run_in_ranks(ranks, load, tmp_path, strategy):
                assert found.keys() == wanted.keys()
                assert all(torch.equal(value, wanted[name]) for name, value in found.items())


def refused(folder: Path) -> tuple[list[str], bool]:
    """Returns what a model in another 4-bit mode says to both files, and whether it kept its values."""
    fabric = Fabric(accelerator="cpu", precision="fp4", strategy="fsdp")
    torch.manual_seed(1)
    model = fabric.setup(Net())
    before, messages = values(model), []
    for load in (
        lambda: fabric.load(folder / "checkpoint", {"model": model}),
        lambda: fabric.load_module(folder / "model.safetensors", model),
    ):
        with pytest.raises(CheckpointError) as caught:
            load()
        messages.append(str(caught.value))
    packed = [name for name, value in before.items() if value.dtype is torch.uint8]
    after = values(model)
    return messages, all(torch.equal(before[name], after[name]) for name in packed)


def test_shards_of_another_mode_of_the_same_size_are_refused_by_name(tmp_path: Path) -> None:
    run_in_ranks(2, saved, tmp_path)
    for messages, kept in run_in_ranks(2, refused, tmp_path):
        assert kept
        assert all("nf4 in blocks of 64 in the checkpoint, this layer is fp4" in message for message in messages)


def floats_saved(folder: Path) -> None:
    fabric = Fabric(accelerator="cpu", precision="32-true", strategy="fsdp")
    torch.manual_seed(0)
    model = fabric.setup(Net())
    fabric.save(folder / "checkpoint", {"model": model})
    fabric.save_module(folder / "model.safetensors", model)


def floats_loaded(folder: Path, strategy: str, whole: bool) -> dict[str, Tensor]:
    fabric, model, _ = made(strategy, seed=1)
    if whole:
        fabric.load_module(folder / "model.safetensors", model, strict=False)
    else:
        fabric.load(folder / "checkpoint", {"model": model}, strict=False)
    return values(model)


@pytest.mark.parametrize("whole", [True, False], ids=["load_module", "load"])
def test_floats_are_quantised_as_they_are_loaded_into_shards(whole: bool, tmp_path: Path) -> None:
    run_in_ranks(2, floats_saved, tmp_path)
    (expected,) = run_in_ranks(1, floats_loaded, tmp_path, "single_device", whole)
    for found in run_in_ranks(2, floats_loaded, tmp_path, "fsdp", whole):
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
