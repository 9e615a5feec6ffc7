"""Checkpoint files: written all or nothing, verified before they are read, never executed.

A checkpoint is a torch zip file whose top-level dict is the user's state, plus one reserved key with the format's
version, the policy that wrote it, the precision plugin's state and the random generators. `torch.load(path,
weights_only=True)` reads it too.
"""

from __future__ import annotations

import io
import os
import pickle
import threading
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.serialization import get_crc32_options, set_crc32_options

from precision_core.checkpoint.error import FORMAT_VERSION, RESERVED, CheckpointError
from precision_core.checkpoint.storage.atomic import atomically

_PLAIN = (
    Tensor,
    nn.Parameter,
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
)
_MAX_INT_BITS = 2000
"""Integers from about 255 bytes on have a pickle opcode that torch.load(weights_only=True) rejects."""

_FLAGS = 0x08 | 0x800
"""Flags of a zip record: sizes after the data, names in UTF-8."""

_CONTAINERS: tuple[type, ...] = (dict, list, tuple, OrderedDict)


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` to a temporary file, which then replaces `path`: a complete checkpoint is there at any moment.

    Raises:
        ValueError: a value that torch.load(weights_only=True) would reject; names its key. The old file stays.
        OSError: a full disk, no permission, a folder at `path`; names the path. The old file stays.
    """
    check_saveable(content)
    with atomically(path) as new, open(new, "xb") as file:
        save_with_checksums(content, file)


_WITH_CHECKSUMS = threading.Lock()
_saving: list[bool] = []
"""For each running save, in any thread: torch's setting of checksums before it began."""


def save_with_checksums(content: Any, file: BinaryIO) -> None:
    """Calls torch.save with checksums, which `read` verifies, also after `set_crc32_options(False)`."""
    with _WITH_CHECKSUMS:
        _saving.append(get_crc32_options())
        set_crc32_options(True)
    try:
        torch.save(content, file)
    finally:
        with _WITH_CHECKSUMS:
            before = _saving[0]
            _saving.pop()
            if not _saving:
                set_crc32_options(before)


def read(path: Path, *, trust: bool = False) -> dict[str, Any]:
    """Returns the content of a checkpoint, verified before anything is unpickled; runs pickled code only if `trust`.

    Its tensors are on the CPU, memory-mapped, and take no memory until they are read. Copy (`copy.deepcopy`) what
    outlives the call: if the file is truncated in place, reading them ends the process (SIGBUS). A save to the same
    path is safe: it puts a new file in place, and the old one exists as long as it is mapped.

    Raises:
        CheckpointError: damaged, truncated, not a checkpoint of Fabric.save, or of a newer format.
        FileNotFoundError: there is no such file.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; a checkpoint of one device is a file")
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    content, is_current = _read(path, trust)
    while not is_current:  # it was replaced meanwhile
        content, is_current = _read(path, trust)
    check_header(path, content)
    return content


def check_header(path: Path, content: Any) -> None:
    """Raises `CheckpointError` unless `content` has the header of `Fabric.save`, in a format that is read here."""
    header = content.get(RESERVED) if isinstance(content, dict) else None
    if not isinstance(header, dict) or not isinstance(header.get("version"), int):
        raise CheckpointError(
            f"{path} was not written by Fabric.save: it has no {RESERVED!r} record. "
            "Read it with torch.load(path, weights_only=True) and pass the parts to load_state_dict"
            " [foreign-checkpoint]"
        )
    if header["version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {header['version']}, written by a newer precision-core; this one reads {FORMAT_VERSION}"
        )
    if not {"precision", "rng"} <= header.keys():
        raise CheckpointError(f"{path} is incomplete: its {RESERVED!r} record has only {sorted(header)}")


def verify(file: BinaryIO) -> None:
    """Raises unless the records of a torch zip file match their checksums; torch.load does not check them.

    Of 1,000 single flipped bits 914 loaded silently wrong. The file is read in pieces, not mapped: if it is truncated
    meanwhile, that is an exception here, not a SIGBUS.
    """
    with zipfile.ZipFile(file) as archive:
        if len({name.lower() for name in archive.namelist()}) < len(archive.namelist()):
            raise zipfile.BadZipFile("two of its records have the same name")
        for record in archive.infolist():  # not covered by checksums; for a "folder" torch returns uninitialised memory
            is_plain = record.compress_type == zipfile.ZIP_STORED and record.compress_size == record.file_size
            if not is_plain or record.external_attr or record.flag_bits & ~_FLAGS:
                raise zipfile.BadZipFile(f"the record {record.filename} has attributes that torch does not write")
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"the record {damaged} does not match its checksum")


def _read(path: Path, trust: bool) -> tuple[Any, bool]:
    """Returns the content, and whether `path` is still the file that was verified."""
    with open(path, "rb") as file:  # outside the try: a missing permission is not a damaged file
        try:
            verify(file)
            content = torch.load(path, map_location="cpu", weights_only=not trust, mmap=True)
            return content, os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} was not written by Fabric.save: it holds objects that torch.load(weights_only=True) "
                "rejects. trust=True loads them, and runs whatever code the file names [foreign-checkpoint]"
            ) from error
        except Exception as error:  # damage shows anywhere: zip structure, checksums, tensor sizes
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise CheckpointError(f"{path} is damaged, or not a checkpoint: {reason} [damaged-checkpoint]") from error


def check_saveable(tree: Any, key: str = "", inside: tuple[int, ...] = ()) -> None:
    """Raises `ValueError` for the first value that `torch.load(weights_only=True)` would reject; names its key."""
    kind = type(tree)
    if isinstance(tree, Tensor) and tree.is_meta:
        raise ValueError(f"cannot save {key or 'the state'}: it is on the meta device and has no values")
    if kind in _CONTAINERS or kind in _PLAIN:  # attributes of a tensor or an OrderedDict are saved with it
        for name, value in getattr(tree, "__dict__", {}).items():
            check_saveable(value, f"{key}.{name}", (*inside, id(tree)))
    if kind in _PLAIN and not (kind is int and tree.bit_length() > _MAX_INT_BITS):
        return
    if kind in _CONTAINERS:
        if id(tree) in inside:
            raise ValueError(f"cannot save {key}: it contains itself")
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for name, value in items:
            if type(name) not in (str, int, float, bool, bytes, type(None)):
                check_saveable(name, f"the key {name!r} of {key or 'the state'}")
            check_saveable(value, f"{key}[{name!r}]", (*inside, id(tree)))
        return
    try:  # try it: types registered as safe and tensor subclasses are accepted
        buffer = io.BytesIO()
        torch.save(tree, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:
        way_out = (
            "Objects with state_dict are saved only as values of a dict: give it a key of its own"
            if hasattr(tree, "state_dict")
            else "Save plain values (float(x), str(path), vars(args), array.tolist()), or give the object state_dict "
            "and load_state_dict"
        )
        raise ValueError(
            f"cannot save {key or 'the state'}: a {kind.__module__}.{kind.__qualname__} would be rejected by "
            f"torch.load(weights_only=True), which takes tensors, numbers, strings and containers of them. {way_out}"
            " [cannot-save]"
        ) from error
