"""Module files: a model's weights alone, as safetensors, for sharing and for starting from.

Names are the plain module's, also under `torch.compile`. Loading streams: a layer's tensors are read when the layer is
loaded, so that of layers that quantise as they load only one has its float weights in memory.
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
from precision_core.checkpoint.shards import is_sharded, unsharded
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
from precision_core.policy.dtypes import FLOAT_DTYPES
from precision_core.precision.masters import NO_MASTERS, Masters

# ---------------------------------------------------------------- saving


def save_module(
    path: str | PathLike[str],
    module: nn.Module,
    *,
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | None = None,
    masters: Masters = NO_MASTERS,
    keep: bool = True,
) -> None:
    """Writes a module's parameters and persistent buffers, in their dtypes, to a safetensors file or folder.

    More than `max_shard_size` (bytes, or "5GB") becomes several files with an index, as Hugging Face has it. A tied
    tensor is written once, under its first name, and the file's metadata maps the others to it. DTensors are gathered:
    all ranks call this; those with `keep` hold the full tensors in CPU memory and write. `dtype` is what floating
    tensors are written in, where `masters` has more to a parameter's value than itself, from that.

    Raises:
        ValueError: a value that safetensors cannot store (names it), an invalid size, an address as path. Nothing was
            written.
        ImportError: safetensors is not installed.
        OSError: a full disk, for example; names the path.
    """
    local = local_path(path, "save_module")
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
    if dtype is not None:
        params = {plain_name(name): param for name, param in module.named_parameters(remove_duplicate=False)}
        tensors = {name: _in_dtype(params.get(name), value, dtype, masters) for name, value in tensors.items()}
    if any(map(is_sharded, tensors.values())):
        tensors = unsharded(tensors, keep)
    if keep:
        safetensors_files.write(local, tensors, metadata, max_shard_size)


def _in_dtype(param: nn.Parameter | None, value: Tensor, dtype: torch.dtype, masters: Masters) -> Tensor:
    if value.dtype not in FLOAT_DTYPES:
        return value
    has_more = param is not None and masters.holds(param)
    return (masters.value(param) if param is not None and has_more else value).to(dtype)


def _unsaveable(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"safetensors stores tensors, not {type(value).__name__}; fabric.save takes it"
    if value.is_meta or is_lazy(value):
        return "it has no values yet"
    if value.layout is not torch.strided or value.is_quantized:
        return "safetensors stores dense tensors only; fabric.save takes it"
    return ""


def _memory(tensor: Tensor) -> Any:
    """Returns a key, equal for tensors with the same values in the same memory; None for one without elements."""
    if is_sharded(tensor):
        return "sharded", *(_memory(tensor.to_local()) or (id(tensor),))  # type: ignore[attr-defined]
    if not tensor.numel():
        return None
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj()


# ---------------------------------------------------------------- loading


def check_no_checkpoint(path: Path) -> None:
    """Raises `CheckpointError` if `fabric.save` wrote `path`, a file or a folder (an engine's too)."""
    is_file = path.is_file() and zipfile.is_zipfile(path)
    if is_file or (path.is_dir() and (path / MANIFEST).exists()):
        raise CheckpointError(
            f"{path} is a checkpoint of fabric.save, and fabric.load_module reads safetensors: read its weights with "
            f'fabric.load({str(path)!r}, {{"model": model}}), under the key that the model was saved with'
        )


def load_module(
    path: str | PathLike[str],
    module: nn.Module,
    strict: bool = True,
    *,
    agree: Callable[[], None] = lambda: None,
    masters: Masters = NO_MASTERS,
) -> Loaded:
    """Loads a safetensors file or folder (of `save_module`, Hugging Face, ...) into a module, in place.

    Returns the missing and unexpected names. Values are cast to the module's dtypes; shapes must be equal, `strict`
    requires equal names and no rounding. A tied tensor may have any of its names. Tensors on the meta device are
    replaced by new ones on the CPU; DTensors get this rank's shards. All is compared before anything is written, except
    in layers with `_load_from_state_dict`, load hooks or extra state of their own, which compare for themselves.
    `agree` is called in between, and may raise because another rank found a problem. `masters` keeps what float32 has
    beyond half parameters.

    Raises:
        CheckpointError: damaged, or a mismatch (names ten at most). Nothing was changed, unless the message says so.
        FileNotFoundError: there is no such file.
        ValueError: an address as path.
        ImportError: safetensors is not installed.
    """
    local = local_path(path, "load_module")
    check_no_checkpoint(local)
    with safetensors_files.opened(local) as files:
        layers = list(layers_of(module))
        versions = versions_of(files, path)
        aliases = {name: first for name, first in files.metadata.items() if first in files.names}
        sources, contradictions = sources_of(files, layers, aliases)
        names = {name for layer in layers for name in layer.slots}
        own = tuple(layer.prefix for layer in layers if layer.own_way)
        missing = sorted(names - sources.keys())
        unexpected = [name for name in files.names if name not in names and not name.startswith(own)]
        differences = _differences(missing, unexpected) if strict else []
        raise_mismatches(path, [*differences, *contradictions, *mismatches(files, layers, sources, strict, masters)])
        agree()
        everything = {**aliases, **{name: name for name in files.names}}
        made: dict[int, Tensor] = {}
        done: set[nn.Module] = set()
        for layer in layers:
            if not layer.own_way:
                load_plain(files, layer, sources, made, masters)
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
