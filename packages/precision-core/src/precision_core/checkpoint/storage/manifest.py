"""The manifest of a checkpoint folder, and how a folder is put in place.

The manifest is written last: a folder without it is incomplete. It lists every file with its size and CRC-32, which
find damage and are no defence: who can change a file can change its checksum. (CRC-32 reads 2.1 GB/s here, SHA-256 0.9,
BLAKE2b 0.5.)

A folder cannot be replaced in one step: the old one is renamed to `.NAME.old`, the new one to NAME, and then the old
one is deleted. After a crash between the two renames NAME is missing, and `.NAME.old`, which is complete, is read
instead until the next save. A crash before them leaves `.NAME.TOKEN.partial`, which nothing reads: delete it.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed import ProcessGroup

from precision_core.checkpoint.agreement import gather, rank_of, size_of, together
from precision_core.checkpoint.error import FORMAT_VERSION, CheckpointError
from precision_core.checkpoint.storage.atomic import sync_folder, synced

MANIFEST = "manifest.json"
_CHUNK = 1 << 20


class Entry(NamedTuple):
    """Size in bytes and CRC-32 of a file."""

    size: int
    crc: int


class Manifest(NamedTuple):
    """The policy that wrote a checkpoint folder, the number of ranks, and the files by name."""

    policy: str
    world_size: int
    files: dict[str, Entry]


def digest(path: Path) -> Entry:
    """Returns the size and CRC-32 of a file."""
    crc = size = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
            size += len(chunk)
    return Entry(size, crc)


def write(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest to disk, which makes the folder complete.

    Raises:
        CheckpointError: the folder does not have the files that the ranks wrote: they do not share a disk.
    """
    sizes = _sizes(folder)
    if sizes != {name: entry.size for name, entry in manifest.files.items()}:
        other = sorted(sizes.keys() ^ manifest.files.keys())
        raise CheckpointError(f"rank 0 does not see what all ranks wrote to {folder}, do they share it? {other[:10]}")
    body = {
        "version": FORMAT_VERSION,
        "policy": manifest.policy,
        "torch": str(torch.__version__),
        "world_size": manifest.world_size,
        "files": manifest.files,
        "complete": True,
    }
    with synced(folder / MANIFEST) as file:
        file.write(json.dumps({**body, "crc": _crc(body)}, indent=1).encode())
    sync_folder(folder)


def read(folder: Path, oldest: int = 1) -> Manifest:
    """Returns the manifest of a folder that has the files listed in it, with these sizes, and no others.

    Raises:
        CheckpointError: incomplete, damaged, not of `Fabric.save`, of a newer format, or one older than `oldest`.
    """
    try:
        body = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: its save was not finished, or it was not written by Fabric.save "
            "(torch.distributed.checkpoint.load reads folders of its own) [foreign-checkpoint]"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: {error}") from error
    if not isinstance(body, dict) or body.pop("crc", None) != _crc(body):
        raise CheckpointError(f"{folder / MANIFEST} is damaged: it does not match its checksum")
    try:
        if not oldest <= body["version"] <= FORMAT_VERSION:
            age = "a newer" if body["version"] > FORMAT_VERSION else "an older"
            raise CheckpointError(
                f"{folder} has format {body['version']}, written by {age} precision-core; this one reads "
                f"{FORMAT_VERSION}"
            )
        files = {name: Entry(*entry) for name, entry in body["files"].items()}
        manifest = Manifest(body["policy"], body["world_size"], files)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is not the manifest of a checkpoint") from error
    sizes = _sizes(folder)
    sizes.pop(MANIFEST, None)
    for problem, names in (
        ("is missing", files.keys() - sizes.keys()),
        ("does not belong to it", sizes.keys() - files.keys()),
        ("has another size", {name for name in files.keys() & sizes.keys() if files[name].size != sizes[name]}),
    ):
        if names:
            raise CheckpointError(f"the checkpoint {folder} is damaged: {', '.join(sorted(names)[:10])} {problem}")
    return manifest


def version(folder: Path) -> tuple[int, ...]:
    """Returns the identity of the manifest file: it differs once another checkpoint has replaced the folder."""
    found = os.stat(folder / MANIFEST) if (folder / MANIFEST).exists() else None
    return () if found is None else (found.st_dev, found.st_ino, found.st_mtime_ns)


def read_file(folder: Path, name: str, manifest: Manifest) -> bytes:
    """Returns the bytes of a small file, once they match the manifest.

    Raises:
        CheckpointError: they do not match.
    """
    data = (folder / name).read_bytes() if name in manifest.files else b""
    if name not in manifest.files or Entry(len(data), zlib.crc32(data)) != manifest.files[name]:
        raise CheckpointError(f"the checkpoint {folder} is damaged: {name} does not match its checksum")
    return data


def verify(folder: Path, manifest: Manifest, names: list[str]) -> None:
    """Raises `CheckpointError` unless the files `names` match the manifest."""
    for name in names:
        if digest(folder / name) != manifest.files[name]:
            raise CheckpointError(f"the checkpoint {folder} is damaged: {name} does not match its checksum")


def _crc(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _sizes(folder: Path) -> dict[str, int]:
    """Returns the size of each file in bytes; -1 for a link or folder."""
    stats = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(folder)}
    return {name: found.st_size if stat.S_ISREG(found.st_mode) else -1 for name, found in stats.items()}


# ---------------------------------------------------------------- in place


def find(path: Path) -> Path:
    """Returns the folder to read for the checkpoint `path`: the old one if a save crashed between the two renames.

    Raises:
        FileNotFoundError: there is no checkpoint.
        CheckpointError: `path` is a file.
    """
    if not path.exists() and _old(path).is_dir():
        return _old(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; a checkpoint of several ranks is a folder")
    return path


def is_folder(path: Path) -> bool:
    """Whether there is a folder to read for the checkpoint `path`, and not an empty one."""
    folder = path if path.exists() else _old(path)
    return folder.is_dir() and any(folder.iterdir())


@contextmanager
def new_folder(path: Path, policy: str, group: ProcessGroup | None) -> Iterator[tuple[Path, dict[str, Entry]]]:
    """Context with a temporary folder for all ranks of `group`, and a dict for the digests of this rank's files.

    At its end rank zero writes the manifest of all ranks' files, and the folder replaces a checkpoint at `path`; if a
    rank raises, the folder is removed. `path` is absolute, on a disk that all ranks share.

    Raises:
        ValueError: there is something at `path` that is not a checkpoint folder.
        CheckpointError: another rank failed, or the ranks do not share a disk.
    """
    is_zero, written = rank_of(group) == 0, dict[str, Entry]()
    temporary = path.with_name(f".{path.name}.{gather(secrets.token_hex(8), group)[0]}.partial")
    try:
        with together(group):
            if is_zero:
                _check_replaceable(path)
                temporary.mkdir(parents=True)
        yield temporary, written
        files = {name: entry for entries in gather(written, group) for name, entry in sorted(entries.items())}
        with together(group):
            if is_zero:
                write(temporary, Manifest(policy, size_of(group), files))
                put_in_place(temporary, path)
    except BaseException:
        if is_zero:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _check_replaceable(path: Path) -> None:
    """Raises `ValueError` if there is anything but a checkpoint folder at `path`: a save would delete it."""
    if path.is_dir() and not path.is_symlink() and ((path / MANIFEST).exists() or not any(path.iterdir())):
        return
    if path.exists() or path.is_symlink():
        raise ValueError(f"cannot save to {path}: it exists and is not a checkpoint folder. Name a new folder")


def put_in_place(temporary: Path, path: Path) -> None:
    """Renames the complete folder `temporary` to `path`; an older checkpoint there is deleted."""
    old = _old(path)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)  # of a save that crashed after its second rename
        os.rename(path, old)
    os.rename(temporary, path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")
