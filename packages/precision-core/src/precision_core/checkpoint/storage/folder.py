"""Checkpoint folders, for strategies that shard: torch.distributed.checkpoint's format, all or nothing, never executed.

A folder holds each rank's shards (`*.distcp`), `chunks.json` (where in them each tensor is), `structure.pt` (everything
else), a manifest, and `.metadata`, by which `torch.distributed.checkpoint.load` reads the tensors under dotted names
too. Any number of ranks reads what any other number wrote. Unsharded tensors and plain values are rank zero's:
`gather` what differs by rank before. All ranks of the group call `write_folder`; an error on one is one on all.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from precision_core.checkpoint.agreement import gather, rank_of, together
from precision_core.checkpoint.error import FORMAT_VERSION, RESERVED, CheckpointError
from precision_core.checkpoint.paths import local_path
from precision_core.checkpoint.shards import check_alike, cpu_like, describe, is_sharded
from precision_core.checkpoint.storage import chunks
from precision_core.checkpoint.storage import dcp as folder_dcp
from precision_core.checkpoint.storage import manifest as folder_manifest
from precision_core.checkpoint.storage.atomic import synced
from precision_core.checkpoint.storage.file import check_saveable
from precision_core.checkpoint.tree import KeyPath, map_leaves, named, paths

STRUCTURE = "structure.pt"


def write_folder(
    path: str | PathLike[str], content: dict[str, Any], *, process_group: ProcessGroup | None = None
) -> None:
    """Writes `content`, nested dicts, lists and tuples of tensors, DTensors and plain values, to the folder `path`.

    All ranks write to a temporary folder beside `path`, on a disk that they share; it replaces `path`, and an older
    checkpoint folder there, when every rank is done.

    Raises:
        ValueError: a value that torch.load(weights_only=True) would reject, or `path` is not a checkpoint folder.
        CheckpointError: another rank failed, or has other tensors.
        OSError: a full disk, for example.
    """
    path, rank, group = local_path(path, "write_folder").absolute(), rank_of(process_group), process_group
    with together(group):
        policy = str(content.get(RESERVED, {}).get("policy", ""))
        structure, tensors = _split(content)
        check_saveable(map_leaves(structure, lambda _, leaf: None if _is_placeholder(leaf) else leaf))
    check_alike(gather(describe(tensors), group))
    with folder_manifest.new_folder(path, policy, group) as (temporary, written):
        metadata = folder_dcp.save(tensors, temporary, group)
        with together(group):
            if rank == 0:
                with synced(temporary / STRUCTURE) as structure_file, synced(temporary / chunks.CHUNKS) as chunks_file:
                    torch.save(structure, structure_file)
                    chunks_file.write(chunks.dumps(metadata))
            written.update((name, folder_manifest.digest(temporary / name)) for name in _written_by(rank, temporary))


def _split(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the structure of `content` and its tensors by name; sparse, quantised and the like stay in the structure.

    The structure is `content` with meta tensors as placeholders. It keeps keys and types (torch.distributed.checkpoint
    alone turns an optimizer's integer keys into strings, and loses tuples), and has shapes and dtypes before any value
    is read.

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
    """A checkpoint folder to read: `content` has meta tensors as placeholders until `fetch` (see `source.Source`).

    Each rank reads on its own. `trust` runs whatever code `structure.pt` names.

    Raises:
        CheckpointError: incomplete, damaged, not of `Fabric.save`, of an older or newer format. No code was run.
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
        """Raises `CheckpointError` unless files match the manifest; each of `ranks` ranks verifies its share."""
        folder_manifest.verify(self.path, self._manifest, sorted(self._manifest.files)[rank::ranks])

    def fetch(
        self, tree: Any, shardings: Mapping[KeyPath, Tensor] = {}, leave: Callable[[KeyPath], bool] = lambda _: False
    ) -> Any:
        """Materialises the placeholders in `tree`, a part of `content`, in CPU memory; returns a copy of it.

        A key path in `shardings` gives a DTensor with this rank's shards; where `leave(key_path)`, placeholders stay.

        Raises:
            CheckpointError: damaged, or replaced while it was read.
        """
        values: dict[str, Tensor] = {}

        def take(key_path: KeyPath, leaf: Any) -> None:
            name = self._names.get(id(leaf))
            if name is None or name in values or (leave(key_path) and key_path not in shardings):
                return
            values[name] = cpu_like(shardings.get(key_path, leaf), leaf.dtype)

        map_leaves(tree, take)
        folder_dcp.load(values, self.path, self._chunks)
        if folder_manifest.version(self.path) != self._version:
            raise CheckpointError(f"{self.path} was replaced while it was read")
        return map_leaves(tree, lambda _, leaf: values.get(self._names.get(id(leaf), ""), leaf))

    def everything(self) -> dict[str, Any]:
        """Returns all of the content but its header, unsharded, on the CPU."""
        self.verify()
        return self.fetch({key: value for key, value in self.content.items() if key != RESERVED})

    def _read(self, name: str) -> bytes:
        return folder_manifest.read_file(self.path, name, self._manifest)

    def _structure(self, trust: bool) -> dict[str, Any]:
        """Returns the structure, from bytes that were read and verified once; runs pickled code only if `trust`."""
        path, data = self.path / STRUCTURE, self._read(STRUCTURE)
        try:
            structure = torch.load(io.BytesIO(data), weights_only=not trust)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise CheckpointError(f"{path} was not written by Fabric.save: {reason}") from error
        if type(structure) is not dict:
            raise CheckpointError(f"{path} was not written by Fabric.save: its structure is not a dict")
        return structure


def _is_placeholder(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_meta


def _written_by(rank: int, folder: Path) -> list[str]:
    """Returns the names of the files that `rank` wrote; rank zero also those of no rank in particular."""
    names = [(name, re.match(r"__(\d+)_", name)) for name in os.listdir(folder)]
    return [name for name, match in names if (int(match[1]) if match else 0) == rank]
