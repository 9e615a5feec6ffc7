"""Checkpoint folders, for strategies that shard: torch.distributed.checkpoint's format, all or nothing, never executed.

A folder holds each rank's shards (`*.distcp`) and their `.metadata`, from which `torch.distributed.checkpoint.load`
reads them under dotted names too, `structure.pt` with everything else, and a manifest. Any number of ranks reads what
any other number wrote. Tensors that are not sharded, and plain values, are rank zero's: gather what every rank has for
itself (`agreement.gather`) before. All ranks of the group call these functions; an error on one is an error on all.
"""

from __future__ import annotations

import io
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import Metadata

from precision_core.checkpoint.agreement import gather, rank_of, size_of, together
from precision_core.checkpoint.error import RESERVED, CheckpointError
from precision_core.checkpoint.fit import misfit, refuse
from precision_core.checkpoint.paths import local_path
from precision_core.checkpoint.shards import check_alike, describe, host_like
from precision_core.checkpoint.storage import chunks as folder_metadata
from precision_core.checkpoint.storage import dcp as folder_dcp
from precision_core.checkpoint.storage import manifest as folder_manifest
from precision_core.checkpoint.storage.file import check_saveable
from precision_core.checkpoint.storage.manifest import Manifest
from precision_core.checkpoint.tree import Path as Place
from precision_core.checkpoint.tree import look_up, map_leaves, named, paths, split

STRUCTURE = "structure.pt"
METADATA = ".metadata"


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
        structure, tensors = split(content)
        check_saveable(map_leaves(structure, lambda _, leaf: None if _stands_in(leaf) else leaf))
        if rank == 0:
            folder_manifest.check_replaceable(path)
    check_alike(gather(describe(tensors), group))
    temporary = path.with_name(f".{path.name}.{gather(secrets.token_hex(8), group)[0]}.partial")
    try:
        with together(group):
            if rank == 0:
                temporary.mkdir(parents=True)
        folder_dcp.save(tensors, temporary, group)
        with together(group):
            if rank == 0:
                with open(temporary / STRUCTURE, "xb") as file:
                    torch.save(structure, file)
                    file.flush()
                    os.fsync(file.fileno())
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


class Folder:
    """A checkpoint folder that is read: what it holds at once, values when they are asked for.

    Each rank reads for itself, and waits for no other. `structure` is the content with a meta tensor in the place of
    each. `trust` executes whatever the pickles in it say.

    Raises:
        CheckpointError: torn, damaged, foreign or newer. Nothing was executed.
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, path: str | PathLike[str], *, trust: bool = False) -> None:
        self.path = folder_manifest.find(local_path(path, "read_folder").absolute())
        self._version = folder_manifest.version(self.path)
        self._manifest = folder_manifest.read(self.path)
        self.structure, self._metadata = _open(self.path, self._manifest, trust)
        found = paths(self.structure, _stands_in)
        self.stand_ins = dict(found)
        self._names = {id(tensor): name for name, tensor in named(found).items()}
        sizes = {name: entry.size for name, entry in self._manifest.files.items()}
        folder_metadata.check(self._metadata, named(found), sizes)

    def verify(self, rank: int = 0, ranks: int = 1) -> None:
        """Raises `CheckpointError` unless the files are what the manifest says; together, `ranks` verify them all."""
        folder_manifest.verify(self.path, self._manifest, sorted(self._manifest.files)[rank::ranks])

    def fill(self, tree: Any, host: Callable[[Place, Tensor], Tensor | None]) -> Any:
        """Returns a copy of `tree`, which holds stand-ins from `structure`, with values in their place.

        `host(place, stand_in)` returns the tensor in host memory that is filled, a DTensor with this rank's shards; or
        None: the stand-in stays.

        Raises:
            CheckpointError: damaged, or replaced meanwhile.
        """
        hosts: dict[str, Tensor] = {}

        def take(place: Place, leaf: Any) -> None:
            name = self._names.get(id(leaf))
            if name is not None and name not in hosts and (tensor := host(place, leaf)) is not None:
                hosts[name] = tensor

        map_leaves(tree, take)
        folder_dcp.load(hosts, self.path, self._metadata)
        if folder_manifest.version(self.path) != self._version:
            raise CheckpointError(f"{self.path} was replaced while it was read")
        return map_leaves(tree, lambda _, leaf: hosts.get(self._names.get(id(leaf), ""), leaf))


def read_folder(
    path: str | PathLike[str],
    into: dict[str, Any] | None = None,
    *,
    strict: bool = True,
    rest: bool = True,
    process_group: ProcessGroup | None = None,
) -> dict[str, Any]:
    """Returns the content of a checkpoint folder, and fills the tensors of `into` in place, sharded as they are.

    `into` is nested as the content was; each of its tensors and DTensors that stands where one was saved gets those
    values, and is what the returned content has there. They are read into host memory first, this rank's shards only,
    and copied when all ranks have everything, so that an error leaves `into` as it was. `strict` wants every tensor of
    `into` in the checkpoint, and none to be rounded. What `into` has no place for is returned whole, on the CPU, on
    each rank; with `rest` false it is left on the meta device, so that `read_folder(path, rest=False)` is what a
    checkpoint holds: plain values, shapes and dtypes. Sparse tensors and other odd ones are returned, not filled in.

    Raises:
        CheckpointError: damaged, torn, foreign, newer, or does not fit; names what. Nothing was executed or changed.
        FileNotFoundError: there is no such folder.
    """
    together_all = together(process_group)
    with together_all:
        folder = Folder(path)
        live = dict(paths(into or {}, lambda tensor: True))
        refuse(folder.path, _problems(folder.stand_ins, live, folder.structure, strict))
    with together_all:
        folder.verify(rank_of(process_group), size_of(process_group))

    def host(place: Place, stand_in: Tensor) -> Tensor | None:
        if place in live:
            return host_like(live[place], stand_in.dtype)
        return torch.empty_like(stand_in, device="cpu") if rest else None

    with together_all:
        content = folder.fill(folder.structure, host)
    filled = {place: tensor for place, tensor in live.items() if place in folder.stand_ins}
    with torch.no_grad():
        for place, tensor in filled.items():
            tensor.copy_(look_up(content, place))
    return map_leaves(content, lambda place, leaf: filled.get(place, leaf))


def _stands_in(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_meta


def _problems(saved: dict[Any, Tensor], live: dict[Any, Tensor], structure: Any, strict: bool) -> Iterator[str]:
    odd = {place for place, _ in paths(structure, lambda tensor: not tensor.is_meta)}  # returned, not filled in
    for place, tensor in live.items():
        name = ".".join(map(str, place))
        if tensor.is_meta:
            yield f"{name}: it is on the meta device; give it memory first (to_empty)"
        elif place in saved:
            if reason := misfit(saved[place], tensor, strict=strict):
                yield f"{name}: {reason}"
        elif strict and place not in odd:
            yield f"{name}: missing in the checkpoint"


def _written_by(rank: int, folder: Path) -> list[str]:
    """Returns the files that `rank` wrote; rank zero also what belongs to nobody alone."""
    names = [(name, re.match(r"__(\d+)_", name)) for name in os.listdir(folder)]
    return [name for name, match in names if (int(match[1]) if match else 0) == rank]


def _open(folder: Path, manifest: Manifest, trust: bool) -> tuple[dict[str, Any], Metadata]:
    """Returns the structure and metadata, from bytes that were read once; executed only if `trust`."""
    metadata = folder_metadata.parse(folder_manifest.read_file(folder, METADATA, manifest), trust=trust)
    data = folder_manifest.read_file(folder, STRUCTURE, manifest)
    try:
        structure = torch.load(io.BytesIO(data), weights_only=not trust)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"{folder / STRUCTURE} was not written by Fabric.save: {reason}") from error
    if type(structure) is not dict:
        raise CheckpointError(f"{folder / STRUCTURE} was not written by Fabric.save: it holds no dict")
    return structure, metadata
