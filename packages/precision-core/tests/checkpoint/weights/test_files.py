"""Module files: what is saved is loaded, whatever the layout of the file and the model, or refused by name."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("safetensors")
import safetensors.torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from precision_core import Fabric, Precision
from precision_core.checkpoint.error import CheckpointError
from precision_core.checkpoint.storage import atomic
from precision_core.checkpoint.weights.files import load_module, save_module
from precision_core.checkpoint.weights.safetensors import parse_size
from precision_core.testing import run_in_ranks


class Model(nn.Module):
    """Tied weights, a scalar, a transposed parameter, and buffers of both kinds."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.rand(()), requires_grad=False)
        self.turned = nn.Parameter(torch.rand(2, 3).T)
        self.register_buffer("steps", torch.tensor(seed))
        self.register_buffer("cache", torch.rand(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x) * self.scale


def equal(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_module(path, Model(0))
    return path


# ---------------------------------------------------------------- saving


def test_a_file_is_what_others_read(path: Path) -> None:
    tensors, state = load_file(path), Model(0).state_dict()
    assert set(tensors) == set(state) - {"head.weight"}
    assert all(torch.equal(tensors[name], state[name]) for name in tensors)
    metadata = metadata_of(path)
    assert metadata["format"] == "pt" and metadata["head.weight"] == "embedding.weight"
    assert json.loads(metadata["precision.versions"])["norm."] == 2
    assert os.listdir(path.parent) == ["model.safetensors"]


def test_views_of_one_storage_are_saved_with_their_own_values(tmp_path: Path) -> None:
    model = nn.Module()
    whole = torch.arange(6.0)
    for name, view in {"a": whole[:4], "b": whole[2:], "c": whole.reshape(2, 3), "d": torch.ones(()).expand(3)}.items():
        model.register_buffer(name, view)
    save_module(tmp_path / "x.safetensors", model)
    tensors = load_file(tmp_path / "x.safetensors")
    assert tensors["a"].tolist() == [0, 1, 2, 3] and tensors["b"].tolist() == [2, 3, 4, 5]
    assert tensors["c"].tolist() == [[0, 1, 2], [3, 4, 5]] and tensors["d"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.eye(3).to_sparse(), "safetensors stores dense tensors only"),
        (torch.ones(2, device="meta"), "it has no values yet"),
        (torch.ones(2, dtype=torch.complex128), r"safetensors cannot store torch\.complex128"),
    ],
)
def test_what_cannot_be_saved_is_named(value: Tensor, message: str, path: Path) -> None:
    model = Model(1)
    model.register_buffer("odd", value)
    with pytest.raises(ValueError, match=f"cannot save odd: {message}"):
        save_module(path, model)
    assert load_module(path, Model(1)) == ((), ()) and os.listdir(path.parent) == ["model.safetensors"]


def test_extra_state_is_named(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"x": 1}

    with pytest.raises(ValueError, match=r"save _extra_state: .* stores tensors, not dict; fabric\.save takes it"):
        save_module(tmp_path / "x", Extra(1, 1))


def test_a_save_that_fails_leaves_the_old_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    for size in (5_000, 50):
        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no space left"):
            save_module(path, Model(1), max_shard_size=size)
        monkeypatch.undo()
        assert os.listdir(path.parent) == ["model.safetensors"]
        model = Model(1)
        load_module(path, model)
        assert equal(model, Model(0))


@pytest.mark.parametrize("size", [5_000, 50])
def test_a_save_that_is_killed_leaves_nothing_for_ever(size: int, path: Path) -> None:
    """Whatever the next save writes, one file or several."""
    others = {".other.safetensors.0123456789abcdef.partial"}
    for kill_at in ("save_file", "replace"):
        process = os.fork()
        if process == 0:
            module, name = (safetensors.torch, "save_file") if kill_at == "save_file" else (os, "replace")
            setattr(module, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
            save_module(path, Model(1), max_shard_size=50)
        os.waitpid(process, 0)
    (path.parent / next(iter(others))).write_bytes(b"somebody else's")
    assert sum(name.endswith(".partial") for name in os.listdir(path.parent)) > 1
    synced: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic, "sync_folder", synced.append)
        save_module(path, Model(2), max_shard_size=size)
    left = {name for name in os.listdir(path.parent) if name.startswith(".")}
    assert left == others and synced and set(synced) == {path.parent}
    model = Model(1)
    load_module(path, model)
    assert equal(model, Model(2))


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_permissions_that_new_files_have(mask: int, path: Path) -> None:
    before = os.umask(mask)
    try:
        for size in (5_000, 50):
            save_module(path, Model(1), max_shard_size=size)
            fabric_file = path.with_name("last.ckpt")
            Fabric(accelerator="cpu").save(fabric_file, {})
            assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o666 & ~mask}
    finally:
        os.umask(before)


class Upgrading(nn.Linear):
    """Its own `load_state_dict` knows an older name, and halves the weights."""

    returns: Any = None

    def load_state_dict(self, state_dict: Any, strict: bool = True) -> Any:
        state = {"weight": state_dict["w"] / 2, "bias": state_dict["bias"]}
        result = super().load_state_dict(state, strict)
        return result if self.returns else None


@pytest.mark.parametrize("returns", [False, True])
def test_an_own_load_state_dict_is_called_as_load_does(returns: bool, path: Path) -> None:
    old = nn.Module()
    old.w, old.bias = nn.Parameter(torch.full((1, 2), 4.0)), nn.Parameter(torch.ones(1))
    fabric, models = Fabric(accelerator="cpu"), [Upgrading(2, 1), Upgrading(2, 1)]
    models[0].returns = models[1].returns = returns
    fabric.save_module(path, old)
    fabric.save(path.with_name("last.ckpt"), {"model": old})
    assert fabric.load_module(path, models[0]) == ((), ())
    fabric.load(path.with_name("last.ckpt"), {"model": models[1]})
    assert models[0].weight.tolist() == models[1].weight.tolist() == [[2.0, 2.0]]
    part = nn.ModuleDict({"inner": Upgrading(2, 1)})  # torch calls that of the root only, and so does load
    fabric.save_module(path, nn.ModuleDict({"inner": nn.Linear(2, 1)}))
    assert fabric.load_module(path, part) == ((), ())


def test_what_an_own_load_state_dict_raises_is_told(path: Path) -> None:
    save_module(path, nn.Linear(2, 1))
    with pytest.raises(CheckpointError, match="the module could not be loaded: KeyError: 'w'"):
        load_module(path, Upgrading(2, 1))


def test_without_the_library_the_error_says_what_to_install(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (lambda: save_module(path, Model()), lambda: load_module(path, Model())):
        with pytest.raises(ImportError, match="pip install safetensors"):
            call()


# ---------------------------------------------------------------- shards


def test_shards_and_their_index(tmp_path: Path) -> None:
    save_module(tmp_path, Model(0), max_shard_size=100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert sorted(os.listdir(tmp_path)) == sorted([*shards, "model.safetensors.index.json"])
    tensors = {name: tensor for shard in shards for name, tensor in load_file(tmp_path / shard).items()}
    assert set(tensors) == set(index["weight_map"]) == set(Model(0).state_dict()) - {"head.weight"}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert all(sum(t.nbytes for t in load_file(tmp_path / shard).values()) <= 100 for shard in shards)


@pytest.mark.parametrize("name", ["", "model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("size", ["5GB", 100])
def test_folder_file_and_index_name_the_same(name: str, size: int | str, tmp_path: Path) -> None:
    save_module(tmp_path / name, Model(0), max_shard_size=size)
    for other in ("", "model.safetensors", "model.safetensors.index.json"):
        model = Model(1)
        assert load_module(tmp_path / other, model) == ((), ())
        assert equal(model, Model(0))


def test_a_newer_save_replaces_an_older_whatever_its_layout(tmp_path: Path) -> None:
    for seed, size in enumerate([100, 300, "5GB", 100, 100, "5GB", "5GB", 300]):
        save_module(tmp_path, Model(seed), max_shard_size=size)
        model = Model(99)
        load_module(tmp_path, model)
        assert equal(model, Model(seed))
        index = tmp_path / "model.safetensors.index.json"
        files = (
            set(json.loads(index.read_text())["weight_map"].values()) | {index.name}
            if size != "5GB"
            else {"model.safetensors"}
        )
        assert set(os.listdir(tmp_path)) == files


@pytest.mark.parametrize("before", [100, "5GB"])
@pytest.mark.parametrize("after", [100, "5GB"])
def test_a_save_that_is_cut_off_anywhere_leaves_the_old_one_or_the_new(
    before: int | str, after: int | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    for steps in range(40):
        save_module(tmp_path, Model(0), max_shard_size=before)
        left = steps

        def count(function: Any) -> Any:
            def step(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise KeyboardInterrupt
                return function(*args, **kwargs)

            return step

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", count(os.replace))
            patch.setattr(Path, "unlink", count(Path.unlink))
            with contextlib.suppress(KeyboardInterrupt):
                save_module(tmp_path, Model(1), max_shard_size=after)
        model = Model(2)
        load_module(tmp_path, model)
        seen.add([equal(model, Model(seed)) for seed in range(2)].index(True))
        if left >= 0:
            break
    assert seen == {0, 1} and left >= 0


def test_sizes() -> None:
    assert [parse_size(size) for size in (7, "7B", "5GB", "1.5 KiB", "2MB", "1TiB")] == [
        7, 7, 5_000_000_000, 1536, 2_000_000, 2**40,
    ]  # fmt: skip
    for wrong in ("5", "5gb", "GB", 0, -1, "0B", "1e9", None, 1.5):
        with pytest.raises(ValueError, match="max_shard_size"):
            parse_size(wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------- loading


def test_a_live_model_keeps_its_parameters_and_ties(path: Path) -> None:
    model = Model(1)
    before = dict(model.named_parameters())
    cache = model.cache.clone()  # type: ignore[operator, union-attr]
    assert load_module(path, model) == ((), ())
    assert equal(model, Model(0)) and torch.equal(model.cache, cache)  # type: ignore[arg-type]
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert model.head.weight is model.embedding.weight and not model.turned.is_contiguous()


def test_a_tie_under_its_other_name(tmp_path: Path) -> None:
    tensors = dict(Model(0).state_dict())
    tensors["turned"] = tensors["turned"].contiguous()
    for dropped in ("head.weight", "embedding.weight"):
        save_file(
            {name: tensor.clone() for name, tensor in tensors.items() if name != dropped}, tmp_path / "x.safetensors"
        )
        model = Model(1)
        assert load_module(tmp_path / "x.safetensors", model) == ((), ())
        assert equal(model, Model(0))


def test_two_values_for_one_tied_tensor_are_refused(tmp_path: Path) -> None:
    tensors = {name: tensor.clone().contiguous() for name, tensor in Model(0).state_dict().items()}
    save_file(tensors, tmp_path / "x.safetensors")
    assert load_module(tmp_path / "x.safetensors", Model(1)) == ((), ())
    tensors["head.weight"] += 1
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"head.weight: tied to embedding.weight in the model, with another val"):
        load_module(tmp_path / "x.safetensors", Model(1))


def test_an_untied_model_gets_the_value_twice(path: Path) -> None:
    model = Model(1)
    model.head.weight = nn.Parameter(torch.zeros(5, 4))
    assert load_module(path, model) == ((), ())
    assert torch.equal(model.head.weight, Model(0).embedding.weight)


def test_a_compiled_model_has_plain_names(path: Path, tmp_path: Path) -> None:
    model = Model(1)
    model.layers[0] = torch.compile(model.layers[0], backend="eager")  # type: ignore[assignment]
    compiled = torch.compile(model, backend="eager")
    assert load_module(path, compiled) == ((), ())
    assert torch.equal(model.layers[0].weight, Model(0).layers[0].weight)  # type: ignore[arg-type]
    save_module(tmp_path / "y.safetensors", compiled)
    assert metadata_of(tmp_path / "y.safetensors") == metadata_of(path)
    theirs, mine = load_file(tmp_path / "y.safetensors"), load_file(path)
    assert theirs.keys() == mine.keys() and all(torch.equal(theirs[name], mine[name]) for name in mine)


def test_a_model_on_the_meta_device_gets_its_values(path: Path) -> None:
    with torch.device("meta"):
        model = Model(1)
    model.cache = torch.ones(2)
    model.embedding.weight.note = "kept"  # type: ignore[attr-defined]
    assert load_module(path, model) == ((), ())
    assert equal(model, Model(0)) and model.head.weight is model.embedding.weight
    assert not model.scale.requires_grad and model.turned.requires_grad and isinstance(model.scale, nn.Parameter)
    assert model.embedding.weight.note == "kept" and not isinstance(model.steps, nn.Parameter)  # type: ignore[attr-defined]
    model.embedding.weight.data.zero_()
    assert load_file(path)["embedding.weight"].any()  # memory of its own


@pytest.mark.parametrize("strict", [True, False])
def test_what_stays_on_the_meta_device_is_refused_by_name(strict: bool, path: Path) -> None:
    with torch.device("meta"):
        model = Model(1)
        model.extra = nn.Linear(1, 1)
    with pytest.raises(CheckpointError) as error:
        load_module(path, model, strict=strict)
    assert "cache: on the meta device, and no checkpoint has it: set its values first" in str(error.value)
    assert "extra.bias: " in str(error.value) and "missing in the checkpoint" in str(error.value)
    assert model.scale.is_meta


def test_a_wider_dtype_is_exact_and_a_narrower_is_asked_for(path: Path) -> None:
    wide = Model(1).double()
    load_module(path, wide)
    assert torch.equal(wide.turned, Model(0).turned.double())
    narrow = Model(1).bfloat16()
    before = {name: tensor.clone() for name, tensor in narrow.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"embedding.weight: torch.float32 in the checkpoint, torch.bfloat16"):
        load_module(path, narrow)
    assert all(torch.equal(tensor, before[name]) for name, tensor in narrow.state_dict().items())
    load_module(path, narrow, strict=False)
    assert torch.equal(narrow.turned, Model(0).turned.bfloat16())
    with torch.device("meta"):
        meta = Model(1).bfloat16()
    meta.cache = torch.ones(2)
    load_module(path, meta, strict=False)
    assert meta.turned.dtype is torch.bfloat16 and torch.equal(meta.turned, narrow.turned)


def test_what_does_not_fit_is_listed_and_nothing_is_changed(path: Path) -> None:
    model = Model(1)
    model.layers[0] = nn.Linear(4, 5)
    model.norm = nn.Identity()
    model.more = nn.ModuleList(nn.Linear(1, 1) for _ in range(4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_module(path, model)
    text = str(error.value)
    assert "more.0.bias: missing in the checkpoint" in text and text.count("\n") == 11 and "and 5 more" in text
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(
        CheckpointError, match=r"layers.0.weight: shape \(4, 4\) in the checkpoint, \(5, 4\) in the model"
    ):
        load_module(path, model, strict=False)
    assert torch.equal(model.scale, before["scale"])


def test_not_strict_returns_what_was_left_out(path: Path) -> None:
    model = Model(1)
    del model.norm
    model.more = nn.Linear(1, 1, bias=False)
    missing, unexpected = load_module(path, model, strict=False)
    assert missing == ("more.weight",) and set(unexpected) == {name for name in Model(0).state_dict() if "norm" in name}
    assert torch.equal(model.scale, Model(0).scale)


# ---------------------------------------------------------------- layers with a way of their own

LIVE: WeakSet[Tensor] = WeakSet()
"""Float tensors that layers were given and that are still there."""


class Quantised(nn.Module):
    """Keeps int8 values; a float weight in a state dict is quantised as it is loaded."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(size, size, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(()))
        self.peak = 0

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        weight = state_dict.pop(f"{prefix}weight")
        LIVE.add(weight)
        self.peak = sum(tensor.nbytes for tensor in LIVE)
        scale = weight.abs().max() / 127
        state_dict[f"{prefix}weight"], state_dict[f"{prefix}scale"] = (weight / scale).round().to(torch.int8), scale
        super()._load_from_state_dict(state_dict, prefix, *args)


class Floats(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_layers_that_quantise_get_their_floats_one_at_a_time(device: str, tmp_path: Path) -> None:
    floats = nn.Sequential(*(Floats(64) for _ in range(6)), nn.Linear(64, 2))
    save_module(tmp_path, floats, max_shard_size="40KB")
    with torch.device(device):
        model = nn.Sequential(*(Quantised(64) for _ in range(6)), nn.Linear(64, 2))
    assert load_module(tmp_path, model) == ((), ())
    for layer, source in zip(model[:6], floats[:6], strict=True):
        assert layer.weight.dtype is torch.int8 and layer.peak == 64 * 64 * 4
        assert torch.allclose(layer.weight * layer.scale, source.weight, atol=float(layer.scale) * 0.51)
    assert torch.equal(model[6].weight, floats[6].weight) and not list(LIVE)


def test_hooks_rename_what_their_layer_loads(tmp_path: Path) -> None:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)
            self._register_load_state_dict_pre_hook(self.rename)

        def rename(self, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
            for name in [name for name in state if name.startswith(f"{prefix}old.")]:
                state[name.replace("old.", "inner.", 1)] = state.pop(name)

    save_module(tmp_path, nn.ModuleDict({"a": nn.ModuleDict({"old": nn.Linear(2, 2)}), "b": nn.Linear(1, 1)}))
    model = nn.ModuleDict({"a": Renamed(), "b": nn.Linear(1, 1)})
    assert load_module(tmp_path, model) == ((), ())
    assert torch.equal(model["a"].inner.weight, load_file(tmp_path / "model.safetensors")["a.old.weight"])


def test_layers_with_their_own_way_say_what_is_missing(tmp_path: Path) -> None:
    save_module(tmp_path, nn.ModuleDict({"a": nn.ModuleDict({"weight2": nn.Linear(1, 1)})}))

    class Own(nn.Linear):
        def _load_from_state_dict(self, *args: Any) -> None:
            super()._load_from_state_dict(*args)

    model = nn.ModuleDict({"a": Own(1, 1)})
    with pytest.raises(CheckpointError, match=r"other layers are changed\) does not match:\n  a.weight: missing"):
        load_module(tmp_path, model)
    missing, unexpected = load_module(tmp_path, model, strict=False)
    assert set(missing) == {"a.weight", "a.bias"} and set(unexpected) == {"a.weight2.weight", "a.weight2.bias"}


def test_versions_reach_layers_with_their_own_way(tmp_path: Path) -> None:
    class Own(nn.Linear):
        _version = 7
        seen: Any = None

        def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *args: Any) -> None:
            self.seen = metadata.get("version")
            super()._load_from_state_dict(state, prefix, metadata, *args)

    save_module(tmp_path, nn.Sequential(nn.Linear(1, 1), Own(1, 1)))
    model = nn.Sequential(nn.Linear(1, 1), Own(1, 1))
    load_module(tmp_path, model)
    assert model[1].seen == 7


# ---------------------------------------------------------------- memory

WIDTH, LAYERS = 2900, 12  # 34 MB each, 404 MB: from 32 MB on malloc keeps nothing that was freed


def peak(function: Callable[[], Any]) -> float:
    """Returns how many MB more than before `function` had at its peak."""

    def anonymous() -> float:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1000

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(anonymous())

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what others freed would be taken first
    done, before, seen = threading.Event(), anonymous(), list[float]()
    thread = threading.Thread(target=watch)
    thread.start()
    kept = function()
    done.set()
    thread.join()
    highest = max([*seen, anonymous()])
    del kept
    return highest - before


def measured(path: Path, device: str) -> tuple[float, float]:
    with torch.device(device):
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    load_module(path, nn.Linear(1, 1), strict=False)  # what is allocated once
    return peak(lambda: load_module(path, model)), peak(lambda: torch.ones(3, WIDTH, WIDTH))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.full), "meta"])
def test_memory_while_loading_is_that_of_the_model(device: str, tmp_path: Path) -> None:
    layer = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    save_file({f"{n}.weight": layer + n for n in range(LAYERS)}, tmp_path / "x.safetensors")
    [(more, of_three_layers)] = run_in_ranks(1, measured, tmp_path / "x.safetensors", device)
    size = layer.nbytes / 1e6
    needed = LAYERS * size if device == "meta" else 0.0
    assert more < needed + 0.05 * LAYERS * size + size
    assert of_three_layers > 0.9 * 3 * size  # the measure measures


class Doubling(Precision):
    """Puts layers in place of linear ones that store twice what they load."""

    def before_load(self, module: nn.Module) -> None:
        for key, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, key, Doubled(child.weight))


class Doubled(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict({f"{prefix}weight": 2 * state[f"{prefix}weight"]}, prefix, *args)


def test_a_plugin_may_replace_the_layers_of_a_model_without_values(tmp_path: Path) -> None:
    fabric, weight = Fabric(accelerator="cpu", precision=Doubling()), torch.rand(2, 3)
    save_file({"0.weight": weight}, tmp_path / "x.safetensors")
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(3, 2, bias=False))
    real = nn.Sequential(nn.Linear(3, 2, bias=False))
    for model, factor in ((empty, 2), (real, 1)):
        fabric.load_module(tmp_path / "x.safetensors", model)
        assert torch.equal(model[0].weight, factor * weight)


def test_layers_with_their_own_way_keep_nothing_of_the_file(tmp_path: Path) -> None:
    class Own(nn.Linear):
        def _load_from_state_dict(self, *args: Any) -> None:
            super()._load_from_state_dict(*args)

    weight = torch.rand(2, 3)
    save_file({"weight": weight}, tmp_path / "x.safetensors")
    model = Own(3, 2, bias=False, device="meta")
    load_module(tmp_path / "x.safetensors", model)
    size = (tmp_path / "x.safetensors").stat().st_size
    with open(tmp_path / "x.safetensors", "r+b") as file:
        file.write(b"\xff" * size)
    assert torch.equal(model.weight, weight)
