"""Checkpoints: on the CPU, whole, readable without torch_xla, and going on bit for bit, dropout included."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from precision_core import Fabric


class Dropping(nn.Module):
    """Tied and with dropout: its training draws from the device's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.dropout = nn.Embedding(8, 4), nn.Dropout(0.5)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.dropout(self.embedding(ids)))


def set_up(mode: str = "bf16-mixed", strategy: str = "xla") -> tuple[Fabric, Dropping, torch.optim.Optimizer]:
    fabric, model = Fabric(accelerator="cpu", strategy=strategy, precision=mode), Dropping()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    fabric.setup(model, optimizer)
    return fabric, model, optimizer


def train(fabric: Fabric, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    ids, losses = torch.arange(8, device=fabric.device), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids), ids)
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_run_goes_on_bit_for_bit_with_the_devices_generator(tmp_path: Path) -> None:
    Fabric.seed_everything(3)
    parts = set_up()
    first = train(*parts, steps=4)
    parts[0].save(tmp_path / "half.ckpt", {"model": parts[1], "optimizer": parts[2]})
    rest, weight = train(*parts, steps=4), parts[1].head.weight.detach().clone()

    Fabric.seed_everything(3)  # seeds the device too
    assert train(*set_up(), steps=4) == first
    Fabric.seed_everything(4)
    fabric, model, optimizer = set_up()
    assert train(fabric, model, optimizer, steps=4) != first
    fabric.load(tmp_path / "half.ckpt", {"model": model, "optimizer": optimizer})
    assert train(fabric, model, optimizer, steps=4) == rest
    assert torch.equal(model.head.weight, weight) and model.head.weight is model.embedding.weight


def test_files_need_no_torch_xla_and_keep_ties(tmp_path: Path, run_python) -> None:  # type: ignore[no-untyped-def]
    fabric, model, optimizer = set_up()
    train(fabric, model, optimizer, steps=2)
    state = {"model": model, "optimizer": optimizer, "nested": {"mask": torch.ones(2, device=fabric.device)}}
    fabric.save(tmp_path / "now.ckpt", state)
    fabric.save(tmp_path / "later.ckpt", state, wait=False).wait()
    fabric.save_module(tmp_path / "module.safetensors", model)
    program = f"""
        import sys, torch
        from safetensors.torch import load_file
        for name in ("now", "later"):
            content = torch.load(rf"{tmp_path}/{{name}}.ckpt", weights_only=True)
            model, moments = content["model"], content["optimizer"]["state"][0]
            tensors = [*model.values(), *moments.values(), content["nested"]["mask"]]
            assert all(tensor.is_cpu for tensor in tensors), tensors
            assert model["head.weight"].data_ptr() == model["embedding.weight"].data_ptr()
        print(model["head.weight"].sum().item(), load_file(r"{tmp_path}/module.safetensors").keys())
        assert "torch_xla" not in sys.modules
    """
    done = run_python(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(model.head.weight.detach().cpu().sum().item())), done.stdout
    before = model.head.weight.detach().cpu()
    with torch.no_grad():
        model.head.weight.zero_()
    fabric.load_module(tmp_path / "module.safetensors", model)
    assert torch.equal(model.head.weight.cpu(), before)


def test_checkpoints_of_one_cpu_load_here_and_the_other_way_round(tmp_path: Path) -> None:
    for here, there in (("single_device", "xla"), ("xla", "single_device")):
        fabric, model, optimizer = set_up("32-true", here)
        train(fabric, model, optimizer, steps=2)
        fabric.save(tmp_path / "x.ckpt", {"model": model, "optimizer": optimizer})
        other, mine, theirs = set_up("32-true", there)
        other.load(tmp_path / "x.ckpt", {"model": mine, "optimizer": theirs})
        assert torch.equal(mine.head.weight.cpu(), model.head.weight.cpu())
        moments = [each.state[each.param_groups[0]["params"][0]]["exp_avg"].cpu() for each in (optimizer, theirs)]
        assert torch.equal(*moments) and mine.head.weight.device == other.device
