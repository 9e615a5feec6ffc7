"""Safetensors checkpoints on disk: one file, or shards with an index, as Hugging Face lays them out.

A path names a file (`model.safetensors`), an index (`model.safetensors.index.json`) or their folder. The checkpoint is
complete at any moment: shards never overwrite those of an older index, and the file or index is put in place last. If
both exist the index counts: it is removed after the file was written, the file after the index.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from precision_core.checkpoint.error import CheckpointError
from precision_core.checkpoint.storage.atomic import atomically, remove_abandoned

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".index.json"
_UNITS = {unit: 1000**power for power, unit in enumerate(("B", "KB", "MB", "GB", "TB"))} | {
    unit: 1024**power for power, unit in enumerate(("KiB", "MiB", "GiB", "TiB"), 1)
}


def library() -> ModuleType:
    """Returns the module `safetensors`; raises `ImportError` with the command that installs it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("saving and loading modules needs safetensors: pip install safetensors") from error
    return safetensors


class Files:
    """The tensors of a checkpoint, memory-mapped: one that is not read takes no memory."""

    def __init__(self, handles: Mapping[Path, Any]) -> None:
        self._owners: dict[str, Any] = {}
        self.names = self._owners.keys()
        self.metadata: dict[str, str] = {}
        for path, handle in handles.items():
            for name in handle.keys():  # noqa: SIM118 - no dict
                if name in self._owners:
                    raise CheckpointError(f"{path.parent} is damaged: {name} is in two of its files")
                self._owners[name] = handle
            self.metadata.update(handle.metadata() or {})

    def get(self, name: str) -> Tensor:
        """Returns a memory-mapped tensor on the CPU; writing to it does not change the file."""
        tensor: Tensor = self._owners[name].get_tensor(name)
        return tensor


@contextmanager
def opened(path: Path) -> Iterator[Files]:
    """Opens a checkpoint for reading.

    Raises:
        CheckpointError: damaged, or an index with files outside of its folder.
        FileNotFoundError: there is no checkpoint.
        ImportError: safetensors is not installed.
    """
    file, index = _file_and_index(path)
    error_type = library().SafetensorError
    with ExitStack() as stack:
        handles: dict[Path, Any] = {}
        for part, names in (_read_index(index) if index.exists() else {file: []}).items():
            try:
                handles[part] = stack.enter_context(library().safe_open(part, framework="pt"))
            except FileNotFoundError:
                if not index.exists():
                    raise FileNotFoundError(f"there is no checkpoint {path}: neither {file} nor {index}") from None
                raise CheckpointError(f"{index} lists {part.name}, which is missing") from None
            except error_type as error:
                raise CheckpointError(f"{part} is damaged, or not a safetensors file: {error}") from error
            absent = sorted(set(names) - set(handles[part].keys()))
            if absent:
                raise CheckpointError(
                    f"{index} lists {', '.join(absent[:10])} in {part.name}, which does not have them"
                )
        yield Files(handles)


def write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], max_shard_size: int | str) -> None:
    """Writes a checkpoint, in shards of at most `max_shard_size` bytes ("5GB") if it is larger; removes an older one.

    Tensors are copied to CPU memory one shard at a time.

    Raises:
        ValueError: an invalid size, or a dtype that safetensors cannot store (names a tensor). Nothing was written.
        ImportError: safetensors is not installed.
    """
    limit, save = parse_size(max_shard_size), library().torch.save
    for dtype, name in {tensor.dtype: name for name, tensor in tensors.items()}.items():
        try:
            save({"x": torch.empty(0, dtype=dtype)})
        except Exception as error:
            raise ValueError(f"cannot save {name}: safetensors cannot store {dtype}") from error
    file, index = _file_and_index(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    old = _shards_of(index)
    shards = _split(tensors, limit)
    token = f"{secrets.token_hex(4)}-" if old else ""  # the old index's shards stay until the new index is there
    stem = file.name.removesuffix(SUFFIX)
    remove_abandoned(
        file.parent, re.compile(rf"{re.escape(stem)}(-[\w-]+)?{re.escape(SUFFIX)}(\.index\.json)?").fullmatch
    )
    names = [f"{stem}-{token}{number:05}-of-{len(shards):05}{SUFFIX}" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        with atomically(file) as new:
            _save(new, shards[0], metadata)
        index.unlink(missing_ok=True)
    else:
        for name, shard in zip(names, shards, strict=True):
            with atomically(file.with_name(name)) as new:
                _save(new, shard, metadata)
        content = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        with atomically(index) as new:
            new.write_text(f"{json.dumps(content, indent=2)}\n", encoding="utf-8", newline="\n")
        file.unlink(missing_ok=True)
    for name in old - set(names if len(shards) > 1 else ()):
        file.with_name(name).unlink(missing_ok=True)


def parse_size(size: int | str) -> int:
    """Returns the bytes of a size such as 5_000_000_000, "5GB" or "4.5 GiB"; raises `ValueError` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B)", str(size))
    if isinstance(size, int) and size > 0:
        return size
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"max_shard_size={size!r}: expected a number of bytes, or a number with {', '.join(_UNITS)}")
    return max(1, int(float(match[1]) * _UNITS[match[2]]))


def _file_and_index(path: Path) -> tuple[Path, Path]:
    """Returns the paths of the single file and of the index of the checkpoint `path`."""
    if path.name.endswith(INDEX_SUFFIX):
        file = path.with_name(path.name.removesuffix(INDEX_SUFFIX))
    else:
        file = path if path.suffix == SUFFIX else path / f"model{SUFFIX}"
    return file, file.with_name(file.name + INDEX_SUFFIX)


def _read_index(index: Path) -> dict[Path, list[str]]:
    """Returns file -> names of its tensors, for the files, all beside it, that an index lists."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        entries = [(str(name), str(file)) for name, file in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is damaged, or not an index of safetensors files") from error
    parts: dict[Path, list[str]] = {}
    for name, file in entries:
        if not file.endswith(SUFFIX) or re.search(r"[/\\:\0]", file):
            raise CheckpointError(f"{index} lists {name} in {file!r}, which is not a safetensors file beside it")
        parts.setdefault(index.with_name(file), []).append(name)
    if not parts:
        raise CheckpointError(f"{index} lists no tensors")
    return parts


def _shards_of(index: Path) -> set[str]:
    try:
        return {path.name for path in _read_index(index)}
    except (CheckpointError, FileNotFoundError):
        return set()


def _split(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    library().torch.save_file({name: _own(tensor) for name, tensor in tensors.items()}, path, metadata)


def _own(tensor: Tensor) -> Tensor:
    """Returns the values in CPU memory, contiguous, in memory that no other tensor shares."""
    own = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return own if own.untyped_storage().nbytes() == own.nbytes else own.clone()
