"""Fabric.save and load of a model of DTensors (fully_shard): folders and files, any number of ranks, errors on one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from precision_core import CheckpointError, Fabric
from precision_core.checkpoint.storage import file as checkpoint
from precision_core.checkpoint.storage import manifest as folder_manifest
from precision_core.strategies import DDPStrategy, Strategy
from precision_core.testing.ranks import RankError, run_in_ranks

SOON = 60  # seconds: an error that another rank is told of comes long before the process group gives up (30 minutes)

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, foreach=True),
    "fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.01),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.01),  # has state from the beginning
}


class Sharding(DDPStrategy):
    """Shards each child of the model, and the rest with the root."""

    def __init__(self, state_dict_type: str = "sharded") -> None:
        super().__init__()
        self.sharded = state_dict_type == "sharded"

    def setup_module(self, module: nn.Module) -> nn.Module:
        module = Strategy.setup_module(self, module)
        for part in (*module.children(), module):
            fully_shard(part)
        return module


class Net(nn.Module):
    """Tied weights, a buffer, and a packed integer parameter; 5 and 7 divide among no number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 7)
        self.packed = nn.Parameter(torch.randint(0, 255, (11,), dtype=torch.uint8), requires_grad=False)
        self.tied = nn.Parameter(torch.randn(3, 7))
        self.again = self.tied

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).relu()) @ self.again.T @ self.tied


def make(
    strategy: Strategy | str, devices: int, optimizer: str = "adamw", seed: int = 0
) -> tuple[Fabric, dict[str, Any]]:
    Fabric.seed_everything(seed)
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=strategy)
    model = fabric.setup(Net())
    return fabric, {"model": model, "optimizer": OPTIMIZERS[optimizer](model.parameters()), "steps": seed, "log": {}}


def train(fabric: Fabric, state: dict[str, Any], steps: int = 3) -> list[float]:
    losses = []
    for number in range(steps):
        state["optimizer"].zero_grad()
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(100 * fabric.global_rank + number))
        loss = state["model"](x).square().mean()
        fabric.backward(loss)
        state["optimizer"].step()
        losses.append(loss.item())
    return losses


def whole(tensor: Any) -> Any:
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().clone() if isinstance(tensor, Tensor) else tensor


def values(state: dict[str, Any]) -> dict[str, Any]:
    """Returns everything in the model and the optimizer, whole, by name."""
    found = {f"model.{name}": whole(value) for name, value in state["model"].state_dict().items()}
    for index, entry in state["optimizer"].state_dict()["state"].items():
        found.update({f"optimizer.{index}.{name}": whole(value) for name, value in entry.items()})
    return found


def same(mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    equal = [
        type(mine[name]) is type(value)
        and (not isinstance(value, Tensor) or (mine[name].dtype is value.dtype and torch.equal(mine[name], value)))
        for name, value in theirs.items()
    ]
    return mine.keys() == theirs.keys() and all(equal)


def strategy_of(kind: str) -> tuple[Strategy | str, int]:
    name, _, count = kind.partition("-")
    return {"one": "auto", "ddp": DDPStrategy(), "folder": Sharding(), "file": Sharding("full")}[name], int(count or 1)


def write(kind: str, optimizer: str, path: Path) -> dict[str, Any]:
    fabric, state = make(*strategy_of(kind), optimizer)
    train(fabric, state)
    before = values(state)
    fabric.save(path, state)
    return before


def read(kind: str, optimizer: str, path: Path, trained: bool) -> tuple[dict[str, Any], bool]:
    fabric, state = make(*strategy_of(kind), optimizer, seed=1)
    if trained:
        train(fabric, state, 1)
    mine = [*state["model"].parameters(), *state["model"].buffers()]
    assert fabric.load(path, state) == {} and state["steps"] == 0
    assert all(a is b for a, b in zip(mine, [*state["model"].parameters(), *state["model"].buffers()], strict=True))
    loaded = values(state)
    moments = [value for entry in state["optimizer"].state.values() for value in entry.values()]
    sharded = all(isinstance(value, DTensor) for value in moments if isinstance(value, Tensor) and value.dim())
    train(fabric, state, 1)
    return loaded, sharded


def run(kind: str, function: Callable[..., Any], *args: Any) -> list[Any]:
    if kind.startswith("one"):
        return [function(kind, *args)]
    return run_in_ranks(strategy_of(kind)[1], function, kind, *args)


@pytest.mark.parametrize(
    ("writer", "reader", "optimizer", "trained"),
    [
        ("folder-2", "folder-2", "adamw", True),
        ("folder-2", "folder-3", "fused", False),
        ("folder-3", "one", "adamw", False),
        ("folder-2", "ddp-2", "momentum", True),
        ("file-2", "folder-3", "adamw", False),
        ("file-3", "one", "momentum", False),
        ("one", "folder-2", "adamw", True),
        ("one", "file-2", "momentum", False),
        ("ddp-2", "folder-2", "fused", False),
        ("folder-2", "file-2", "sgd", False),
        ("file-2", "file-2", "adagrad", True),
    ],
)
def test_every_value_comes_back(writer: str, reader: str, optimizer: str, trained: bool, tmp_path: Path) -> None:
    expected = run(writer, write, optimizer, tmp_path / "x")[0]
    assert (tmp_path / "x").is_dir() == writer.startswith("folder")
    for loaded, sharded in run(reader, read, optimizer, tmp_path / "x", trained):
        assert same(loaded, expected)
        assert sharded or not reader.startswith(("folder", "file"))


# ---------------------------------------------------------------- dtypes, and what is left


def keep_dtypes(path: Path, kind: str, fresh: bool) -> tuple[Any, ...]:
    def made(seed: int) -> dict[str, Any]:
        fabric, state = make(*strategy_of(kind), "momentum", seed)
        state["model"].bfloat16()
        return {**state, "fabric": fabric}

    state = made(0)
    fabric = state.pop("fabric")
    generator = torch.Generator().manual_seed(0)
    for param in state["model"].parameters():
        if param.requires_grad:  # an optimizer that keeps float32 state under bfloat16 parameters
            moment = torch.rand(param.shape, generator=generator)
            buffer = torch.empty_like(param, dtype=torch.float32, requires_grad=False)
            buffer.copy_(torch.distributed.tensor.distribute_tensor(moment, param.device_mesh, param.placements))
            state["optimizer"].state[param]["momentum_buffer"] = buffer
    expected = values(state)
    fabric.save(path, state)
    state = made(1)
    fabric = state.pop("fabric")
    if not fresh:
        train_state = torch.empty_like(state["model"].first.weight, dtype=torch.bfloat16, requires_grad=False)
        state["optimizer"].state[state["model"].first.weight]["momentum_buffer"] = train_state
    fabric.load(path, state)
    loaded = values(state)
    return same(loaded, expected), {value.dtype for name, value in loaded.items() if name.startswith("optimizer")}


@pytest.mark.parametrize("kind", ["folder-2", "file-2"])
@pytest.mark.parametrize("fresh", [True, False])
def test_float32_state_under_bfloat16_parameters_is_not_rounded(kind: str, fresh: bool, tmp_path: Path) -> None:
    for outcome in run_in_ranks(2, keep_dtypes, tmp_path / "x", kind, fresh):
        assert outcome == (True, {torch.float32})


def load_the_model_only(path: Path, kind: str) -> None:
    fabric, state = make(*strategy_of(kind))
    train(fabric, state)
    fabric.save(
        path, {**state, "log": {"best": torch.ones(2)}, "nested": {"other": state["model"], "x": torch.ones(1)}}
    )
    _, other = make(fabric._strategy, 2, seed=1)
    rest = fabric.load(path, {"model": other["model"], "log": {}, "nested": {"other": other["model"]}})
    assert same(values(other), fabric.broadcast(values({**state, "optimizer": other["optimizer"]})))
    assert rest["steps"] == 0 and rest["optimizer"]["param_groups"][0]["lr"] == 0.01
    assert rest["optimizer"]["state"][1]["exp_avg"].is_meta and rest["nested"]["x"].is_meta


@pytest.mark.parametrize("kind", ["folder-2", "file-2"])
def test_what_has_no_place_is_not_read(kind: str, tmp_path: Path) -> None:
    run_in_ranks(2, load_the_model_only, tmp_path / "x", kind)


def read_by_torch(path: Path) -> bool:
    _, state = make(Sharding(), 3, seed=1)
    train(_, state, 1)
    tensors = {"model": state["model"].state_dict(), "optimizer": {"state": state["optimizer"].state_dict()["state"]}}
    dcp.load(tensors, checkpoint_id=path)
    return values(state)  # type: ignore[return-value]


def test_torchs_own_reader_reads_models_and_optimizers(tmp_path: Path) -> None:
    expected = run("folder-2", write, "adamw", tmp_path / "x")[0]
    for loaded in run_in_ranks(3, read_by_torch, tmp_path / "x"):
        assert same(loaded, expected)


# ---------------------------------------------------------------- errors


class Fails:
    """An object whose loading fails, on one rank, after it has changed."""

    def __init__(self, rank: int) -> None:
        self.rank, self.value = rank, 1

    def state_dict(self) -> dict[str, int]:
        return {"value": 2}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]
        if dist.get_rank() == self.rank:
            raise RuntimeError("the reason")


def other_model(state: dict[str, Any]) -> None:
    state["model"] = nn.Linear(7, 5)


def other_optimizer(state: dict[str, Any]) -> None:
    state["optimizer"] = torch.optim.SGD(state["model"].parameters(), lr=0.1)


LOAD_ERRORS: dict[str, tuple[Callable[..., Any], str]] = {
    "model": (other_model, "model.first.weight: unexpected in the checkpoint"),
    "optimizer": (other_optimizer, "so another optimizer than SGD wrote it"),
    "object": (lambda state: state.update(broken=Fails(1)), "broken could not be loaded, nothing was changed"),
    "missing": (lambda state: None, "there is no checkpoint"),
    "value": (lambda state: state.update(epoch=0), "epoch: missing in the checkpoint"),
}


def load_with_error(kind: str, path: Path, error: str) -> tuple[str, float]:
    fabric, state = make(*strategy_of(kind))
    state["broken"] = Fails(-1)
    train(fabric, state)
    fabric.save(path, state)
    train(fabric, state, 1)
    before = values(state)
    if fabric.global_rank == 1:
        wrong = dict(state)
        LOAD_ERRORS[error][0](wrong)
        path = path / "no" if error == "missing" else path
    else:
        wrong = state
    start, generators = time.monotonic(), torch.get_rng_state()
    with pytest.raises((CheckpointError, FileNotFoundError)) as caught:
        fabric.load(path, wrong)
    took = time.monotonic() - start
    assert same(values(state), before) and state["broken"].value == 1
    assert torch.equal(torch.get_rng_state(), generators)
    return str(caught.value), took


@pytest.mark.parametrize("kind", ["folder-2", "file-2"])
@pytest.mark.parametrize("error", LOAD_ERRORS)
def test_an_error_on_one_rank_is_one_on_all_and_changes_nothing(kind: str, error: str, tmp_path: Path) -> None:
    for rank, (said, took) in enumerate(run_in_ranks(2, load_with_error, kind, tmp_path / "x", error)):
        assert LOAD_ERRORS[error][1] in said and took < SOON
        assert rank == 1 or said.startswith("rank 1 could not load the checkpoint: ")


def damage(path: Path, how: str) -> None:
    shard = path / "__1_0.distcp"
    if how == "deleted":
        shard.unlink()
    elif how == "cut":
        os.truncate(shard, 100)
    elif how == "flipped":
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    else:
        (path / "manifest.json").unlink()


def load_damaged(kind: str, path: Path, how: str) -> str:
    fabric, state = make(*strategy_of(kind))
    train(fabric, state)
    fabric.save(path, state)
    train(fabric, state, 1)
    before = values(state)
    if fabric.global_rank == 0:
        damage(path, how)
    fabric.barrier()
    with pytest.raises(CheckpointError) as caught:
        fabric.load(path, state)
    assert same(values(state), before)
    return str(caught.value)


@pytest.mark.parametrize("how", ["deleted", "cut", "flipped", "torn"])
def test_a_damaged_folder_is_an_error_on_all_ranks(how: str, tmp_path: Path) -> None:
    words = {"deleted": "is missing", "cut": "another size", "flipped": "checksum", "torn": "was not finished"}
    assert all(words[how] in said for said in run_in_ranks(2, load_damaged, "folder-2", tmp_path / "x", how))


def save_with_error(kind: str, path: Path) -> str:
    fabric, state = make(*strategy_of(kind))
    fabric.save(path, state)
    if fabric.global_rank == 1:
        state["more"] = nn.Linear(2, 2) if kind == "folder-2" else fully_shard(nn.Linear(2, 2))
    elif kind == "file-2":
        fully_shard(nn.Linear(2, 2))
    with pytest.raises(CheckpointError) as caught:
        fabric.save(path, state)
    assert fabric.load(path)["steps"] == 0
    return str(caught.value)


@pytest.mark.parametrize("kind", ["folder-2", "file-2"])
def test_another_model_on_one_rank_is_not_saved(kind: str, tmp_path: Path) -> None:
    for said in run_in_ranks(2, save_with_error, kind, tmp_path / "x"):
        assert "ranks 0 and 1 have different tensors: more." in said
    assert os.listdir(tmp_path) == ["x"]


def die(path: Path, outcome: Path) -> None:
    fabric, state = make(Sharding(), 2)
    fabric.save(path, state)
    train(fabric, state)
    if fabric.global_rank == 1:
        dcp.FileSystemWriter.write_data = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    start = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        fabric.save(path, state)
    outcome.write_text(f"{time.monotonic() - start:.1f} {caught.value}")
    os._exit(0)  # as long as it lives, it holds the dead one's pipe open


def test_a_rank_that_is_killed_in_a_save_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="rank 1 of 2:\nit died"):
        run_in_ranks(2, die, tmp_path / "x", tmp_path / "said")
    took, said = (tmp_path / "said").read_text().split(maxsplit=1)
    assert float(took) < SOON and said.startswith("another rank died")
    fabric, state = make("auto", 1, seed=1)
    fabric.load(tmp_path / "x", state)
    assert same(values(state), values(make("auto", 1)[1]))
    assert sorted(os.listdir(tmp_path)) == ["said", "x"]


# ---------------------------------------------------------------- in the background


def train_on(kind: str, path: Path) -> bool:
    fabric, state = make(*strategy_of(kind))
    train(fabric, state)
    expected = fabric.broadcast(values(state))
    save = fabric.save(path, state, wait=False)
    train(fabric, state, 5)  # with collectives, while the threads have theirs
    second = fabric.save(path.with_name("y"), state, wait=False)
    assert save.done
    second.wait()
    fabric.load(path, state)
    return same(values(state), expected)


@pytest.mark.parametrize("kind", ["folder-2", "file-2", "ddp-2"])
def test_training_goes_on_while_ranks_save(kind: str, tmp_path: Path) -> None:
    assert run_in_ranks(2, train_on, kind, tmp_path / "x") == [True, True]
    assert sorted(os.listdir(tmp_path)) == ["x", "y"]


def fail_on_one(kind: str, path: Path) -> str:
    monkeypatch = pytest.MonkeyPatch()
    fabric, state = make(*strategy_of(kind))
    fabric.save(path, state)
    failing, name = (checkpoint, "write") if kind == "ddp-2" else (folder_manifest, "digest")
    if fabric.global_rank == int(kind != "ddp-2"):
        monkeypatch.setattr(failing, name, fail)
    save = fabric.save(path, {"step": 2}, wait=False)
    with pytest.raises((OSError, CheckpointError)) as caught:
        save.wait()
    monkeypatch.undo()
    assert fabric.load(path)["steps"] == 0
    return str(caught.value)


def fail(*_: Any) -> Any:
    raise OSError("no space left on device")


@pytest.mark.parametrize("kind", ["folder-2", "ddp-2"])
def test_an_error_on_one_rank_is_raised_on_all(kind: str, tmp_path: Path) -> None:
    assert all("no space left" in said for said in run_in_ranks(2, fail_on_one, kind, tmp_path / "x"))
    assert os.listdir(tmp_path) == ["x"]


def teardown_waits(path: Path) -> bool:
    fabric, state = make(*strategy_of("folder-2"))
    save = fabric.save(path, state, wait=False)
    fabric.teardown()
    save.wait()
    return True


def test_a_teardown_waits_for_the_save(tmp_path: Path) -> None:
    assert run_in_ranks(2, teardown_waits, tmp_path / "x") == [True, True]
    assert Fabric(accelerator="cpu").load(tmp_path / "x")["steps"] == 0
