"""Module files: a model's weights alone, as safetensors, for sharing and for starting from.

Names are the plain module's, also under `torch.compile`. Loading streams: a layer's tensors are looked at when it is
its turn, so that a layer which quantises as it loads is the only one whose float weights are in memory.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from precision_core.checkpoint.error import CheckpointError
from precision_core.checkpoint.live.compare import raise_mismatches
from precision_core.checkpoint.live.state import plain_name
from precision_core.checkpoint.paths import local_path
from precision_core.checkpoint.shards import is_sharded, made_whole
from precision_core.checkpoint.storage.manifest import MANIFEST
from precision_core.checkpoint.weights import safetensors as safetensors_files
from precision_core.checkpoint.weights.layers import (
    VERSIONS,
    Loaded,
    layers_of,
    load_own_way,
    load_plain,
    mismatches,
    prefix_of,
    sources_of,
    versions_of,
)

# ---------------------------------------------------------------- saving


def save_module(
    path: str | PathLike[str], module: nn.Module, *, max_shard_size: int | str = "5GB", keep: bool = True
) -> None:
    """Writes a module's parameters and persistent buffers to a safetensors file, or to a folder.

    Larger ones become shards with an index, as Hugging Face has it. A tensor under several names is written once, under
    the first, and the file's metadata maps the others to it. What is sharded over ranks is gathered: all of them call
    this, and one has `keep`, holds the whole in host memory, and writes.

    Raises:
        ValueError: a value that safetensors does not have; names it. Nothing was written.
        ImportError: safetensors is not installed.
    """
    place = local_path(path, "save_module")
    state = module.state_dict()
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    kept: dict[Any, str] = {}
    for key, value in state.items():
        name = plain_name(key)
        if reason := _unsaveable(value):
            raise ValueError(f"cannot save {name}: {reason}")
        first = kept.setdefault(_memory(value) or name, name)
        if first == name:
            tensors[name] = value
        else:
            ties[name] = first
    modules: dict[str, Any] = getattr(state, "_metadata", {})
    versions = {prefix_of(name): item["version"] for name, item in modules.items() if "version" in item}
    metadata = {**ties, "format": "pt", VERSIONS: json.dumps(versions)}  # "pt" is what Hugging Face asks for
    if any(map(is_sharded, tensors.values())):
        tensors = made_whole(tensors, keep)
    if keep:
        safetensors_files.write(place, tensors, metadata, max_shard_size)


def _unsaveable(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__} is no tensor; fabric.save takes it"
    if value.is_meta or is_lazy(value):
        return "it has no values yet"
    if value.layout is not torch.strided or value.is_quantized:
        return "safetensors has dense tensors only; fabric.save takes it"
    return ""


def _memory(tensor: Tensor) -> Any:
    """Returns what two tensors have in common that are the same values in the same memory; None when it is empty."""
    if is_sharded(tensor):
        return "sharded", *(_memory(tensor.to_local()) or (id(tensor),))  # type: ignore[attr-defined]
    if not tensor.numel():
        return None
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj()


# ---------------------------------------------------------------- loading


def check_no_checkpoint(path: Path) -> None:
    """Raises `CheckpointError` for what `fabric.save` wrote, a folder (whatever engine's) or a file."""
    is_file = path.is_file() and zipfile.is_zipfile(path)
    if is_file or (path.is_dir() and (path / MANIFEST).exists()):
        raise CheckpointError(
            f"{path} is a checkpoint of fabric.save, and fabric.load_module reads safetensors: read its weights with "
            f'fabric.load({str(path)!r}, {{"model": model}}), under the key that they were saved with'
        )


def load_module(
    path: str | PathLike[str], module: nn.Module, strict: bool = True, *, agree: Callable[[], None] = lambda: None
) -> Loaded:
    """Loads what `save_module`, safetensors or Hugging Face wrote into a module, in place; returns what was left out.

    Values go into the dtypes that the module has. `strict` wants the same names, and no value to be rounded; shapes
    must always be equal. A tied tensor may be under any of its names. Tensors on the meta device are replaced by ones
    on the CPU. All is compared before anything is written, except in layers with a `_load_from_state_dict`, load hooks
    or extra state of their own: they get their tensors as the file has them, and judge for themselves. `agree` is
    called in between, and raises where another rank has found a problem.

    Raises:
        CheckpointError: damaged, or it does not fit; names the first ten. Nothing was changed, unless it says so.
        FileNotFoundError: there is no such file.
        ImportError: safetensors is not installed.
    """
    place = local_path(path, "load_module")
    check_no_checkpoint(place)
    with safetensors_files.opened(place) as files:
        layers = list(layers_of(module))
        versions = versions_of(files, path)
        aliases = {name: first for name, first in files.metadata.items() if first in files.names}
        sources, contradictions = sources_of(files, layers, aliases)
        names = {name for layer in layers for name in layer.slots}
        own = tuple(layer.prefix for layer in layers if layer.own_way)
        missing = sorted(names - sources.keys())
        unexpected = [name for name in files.names if name not in names and not name.startswith(own)]
        differences = _differences(missing, unexpected) if strict else []
        raise_mismatches(path, [*differences, *contradictions, *mismatches(files, layers, sources, strict)])
        agree()
        everything = {**aliases, **{name: name for name in files.names}}
        made: dict[int, Tensor] = {}
        done: set[nn.Module] = set()
        for layer in layers:
            if not layer.own_way:
                load_plain(files, layer, sources, made)
            elif layer.module not in done:
                done.add(layer.module)
                theirs = load_own_way(files, layer, everything, versions, strict)
                if strict:
                    raise_mismatches(f"{path} (other layers are changed)", _differences(*theirs))
                missing += theirs.missing
                unexpected += theirs.unexpected
    return Loaded(tuple(missing), tuple(unexpected))


def _differences(missing: Iterable[str], unexpected: Iterable[str]) -> list[str]:
    return [
        *(f"{name}: missing in the checkpoint" for name in missing),
        *(f"{name}: unexpected in the checkpoint" for name in unexpected),
    ]
