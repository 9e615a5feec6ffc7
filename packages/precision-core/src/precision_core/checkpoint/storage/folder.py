"""Checkpoint folders, for strategies that shard: torch.distributed.checkpoint's format, all or nothing, never executed.

A folder holds each rank's shards (`*.distcp`), `chunks.json` with where each tensor lies in them, `structure.pt` with
everything else, and a manifest; and a `.metadata`, from which `torch.distributed.checkpoint.load` reads the tensors
under dotted names too. Any number of ranks reads what
any other number wrote. Tensors that are not sharded, and plain values, are rank zero's: gather what every rank has for
itself (`agreement.gather`) before. All ranks of the group call these functions; an error on one is an error on all.
"""

from __future__ import annotations

import io
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from precision_core.checkpoint.agreement import gather, rank_of, size_of, together
from precision_core.checkpoint.error import FORMAT_VERSION, RESERVED, CheckpointError
from precision_core.checkpoint.paths import local_path
from precision_core.checkpoint.shards import check_alike, describe, host_like, is_sharded
from precision_core.checkpoint.storage import chunks
from precision_core.checkpoint.storage import dcp as folder_dcp
from precision_core.checkpoint.storage import manifest as folder_manifest
from precision_core.checkpoint.storage.atomic import synced
from precision_core.checkpoint.storage.file import check_saveable
from precision_core.checkpoint.storage.manifest import Manifest
from precision_core.checkpoint.tree import KeyPath, map_leaves, named, paths

STRUCTURE = "structure.pt"


def write_folder(
    path: str | PathLike[str], content: dict[str, Any], *, process_group: ProcessGroup | None = None
) -> None:
    """Writes `content`, nested dicts, lists and tuples of tensors, DTensors and plain values, to the folder `path`.

    It is written to a folder beside `path`, which must be on a disk that all ranks share, and put in place when every
    rank is done; an older checkpoint folder stays whole until then, and is deleted.

    Raises:
        ValueError: a value that a safe load would refuse, or something at `path` that is no checkpoint folder.
        CheckpointError: another rank failed, or has other tensors.
        OSError: a disk that is full, for example.
    """
    path, rank, group = local_path(path, "write_folder").absolute(), rank_of(process_group), process_group
    with together(group):
        structure, tensors = _split(content)
        check_saveable(map_leaves(structure, lambda _, leaf: None if _is_placeholder(leaf) else leaf))
        if rank == 0:
            folder_manifest.check_replaceable(path)
    check_alike(gather(describe(tensors), group))
    temporary = path.with_name(f".{path.name}.{gather(secrets.token_hex(8), group)[0]}.partial")
    try:
        with together(group):
            if rank == 0:
                temporary.mkdir(parents=True)
        metadata = folder_dcp.save(tensors, temporary, group)
        with together(group):
            if rank == 0:
                with synced(temporary / STRUCTURE) as structure_file, synced(temporary / chunks.CHUNKS) as chunks_file:
                    torch.save(structure, structure_file)
                    chunks_file.write(chunks.dumps(metadata))
            written = {name: folder_manifest.digest(temporary / name) for name in _written_by(rank, temporary)}
        files = {name: entry for entries in gather(written, group) for name, entry in sorted(entries.items())}
        with together(group):
            if rank == 0:
                policy = str(content.get(RESERVED, {}).get("policy", ""))
                folder_manifest.write(temporary, Manifest(policy, size_of(group), files))
                folder_manifest.put_in_place(temporary, path)
    except BaseException:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _split(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the structure of `content` and its tensors by name; sparse and the like stay in the structure.

    The structure is the content with a meta tensor in the place of each: it keeps keys and types, where
    torch.distributed.checkpoint alone turns an optimizer's integer keys into strings and loses tuples, and it tells
    shapes and dtypes before a tensor is read.

    Raises:
        ValueError: it contains itself, or a tensor on the meta device.
    """
    tensors: list[tuple[KeyPath, Tensor]] = []

    def take(path: KeyPath, leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_meta:
            raise ValueError(f"cannot save {'.'.join(map(str, path))}: it is on the meta device and has no values")
        if not _is_sharded_or_plain(leaf):
            return leaf
        tensors.append((path, leaf.detach()))
        return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")

    try:
        structure = map_leaves(content, take)
    except RecursionError as error:
        raise ValueError("cannot save the state: it contains itself, or is nested too deep") from error
    return structure, named(tensors)


def _is_sharded_or_plain(leaf: Any) -> bool:
    if isinstance(leaf, Tensor) and is_sharded(leaf):
        return True
    plain = type(leaf) in (Tensor, nn.Parameter) and leaf.layout is torch.strided and not vars(leaf)
    return plain and not (leaf.is_quantized or leaf.is_conj() or leaf.is_neg())


class Folder:
    """A checkpoint folder that is read: what it holds at once, values when they are asked for (see `source.Source`).

    Each rank reads for itself, and waits for no other. `content` has a meta tensor in the place of each. `trust`
    executes whatever `structure.pt` says.

    Raises:
        CheckpointError: torn, damaged, foreign, older or newer. Nothing was executed.
        FileNotFoundError: there is no such folder.
    """

    refused: Mapping[KeyPath, str] = {}

    def __init__(self, path: str | PathLike[str], *, trust: bool = False) -> None:
        self.path = folder_manifest.find(local_path(path, "fabric.load").absolute())
        self._version = folder_manifest.version(self.path)
        self._manifest = folder_manifest.read(self.path, oldest=FORMAT_VERSION)
        self.content = self._structure(trust)
        tensors = named(paths(self.content, _is_placeholder))
        self._names = {id(tensor): name for name, tensor in tensors.items()}
        sizes = {name: entry.size for name, entry in self._manifest.files.items()}
        self._chunks = chunks.loads(self._read(chunks.CHUNKS), tensors, sizes)

    def verify(self, rank: int = 0, ranks: int = 1) -> None:
        """Raises `CheckpointError` unless the files are what the manifest says; together, `ranks` verify them all."""
        folder_manifest.verify(self.path, self._manifest, sorted(self._manifest.files)[rank::ranks])

    def fetch(
        self, tree: Any, shardings: Mapping[KeyPath, Tensor] = {}, leave: Callable[[KeyPath], bool] = lambda _: False
    ) -> Any:
        """Returns a copy of `tree`, which holds placeholders from `content`, with values on the CPU in their place.

        A key path in `shardings` gives a DTensor with this rank's shards. Where `leave(key_path)`, it stays as it is.

        Raises:
            CheckpointError: damaged, or replaced meanwhile.
        """
        values: dict[str, Tensor] = {}

        def take(key_path: KeyPath, leaf: Any) -> None:
            name = self._names.get(id(leaf))
            if name is None or name in values or (leave(key_path) and key_path not in shardings):
                return
            values[name] = host_like(shardings.get(key_path, leaf), leaf.dtype)

        map_leaves(tree, take)
        folder_dcp.load(values, self.path, self._chunks)
        if folder_manifest.version(self.path) != self._version:
            raise CheckpointError(f"{self.path} was replaced while it was read")
        return map_leaves(tree, lambda _, leaf: values.get(self._names.get(id(leaf), ""), leaf))

    def everything(self) -> dict[str, Any]:
        """Returns all of it, on the CPU, but for the header."""
        self.verify()
        return self.fetch({key: value for key, value in self.content.items() if key != RESERVED})

    def _read(self, name: str) -> bytes:
        return folder_manifest.read_file(self.path, name, self._manifest)

    def _structure(self, trust: bool) -> dict[str, Any]:
        """Returns the structure, from bytes that were read once; executed only if `trust`."""
        path, data = self.path / STRUCTURE, self._read(STRUCTURE)
        try:
            structure = torch.load(io.BytesIO(data), weights_only=not trust)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise CheckpointError(f"{path} was not written by Fabric.save: {reason}") from error
        if type(structure) is not dict:
            raise CheckpointError(f"{path} was not written by Fabric.save: it holds no dict")
        return structure


def _is_placeholder(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_meta


def _written_by(rank: int, folder: Path) -> list[str]:
    """Returns the files that `rank` wrote; rank zero also what belongs to nobody alone."""
    names = [(name, re.match(r"__(\d+)_", name)) for name in os.listdir(folder)]
    return [name for name, match in names if (int(match[1]) if match else 0) == rank]
