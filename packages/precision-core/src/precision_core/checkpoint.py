"""Checkpoint files: written all or nothing, verified before they are read, never executed.

A checkpoint is a torch zip file whose top-level dict is the user's state, plus one reserved key with the format's
version, the policy that wrote it, the precision plugin's state and the random generators. `torch.load(path,
weights_only=True)` reads it too.
"""

from __future__ import annotations

import io
import os
import pickle
import secrets
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

RESERVED = "__precision__"
FORMAT_VERSION = 1

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
"""From about 255 bytes on, integers have a pickle opcode that a safe load refuses."""

_CONTAINERS: tuple[type, ...] = (dict, list, tuple, OrderedDict)


class CheckpointError(ValueError):
    """A checkpoint that is damaged, foreign, or does not fit what it is loaded into; nothing was changed."""


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` to a new file beside `path`, then puts it in place, so that `path` is whole at any moment.

    Raises:
        ValueError: a value that a safe load would refuse; names its key. The old file stays.
    """
    check_saveable(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with open(temporary, "xb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Returns the content of a checkpoint, its tensors on `device`.

    torch.load checks no checksum: of 1,000 single flipped bits 914 loaded silently wrong. So every record is verified
    before anything is unpickled, and nothing in the file is executed.

    Raises:
        CheckpointError: damaged, truncated, not a checkpoint of Fabric.save, or of a newer format.
        FileNotFoundError: there is no such file.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; a checkpoint of one device is a file")
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    with open(path, "rb") as file:  # outside the try: a missing permission is not a damaged file
        try:
            _verify(file)
            content = torch.load(file, map_location=device, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} was not written by Fabric.save: it holds objects that a safe load refuses"
            ) from error
        except Exception as error:  # damage shows anywhere: zip structure, checksums, tensor sizes
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise CheckpointError(f"{path} is damaged, or no checkpoint: {reason}") from error
    header = content.get(RESERVED) if isinstance(content, dict) else None
    if not isinstance(header, dict) or not isinstance(header.get("version"), int):
        raise CheckpointError(
            f"{path} was not written by Fabric.save: it has no {RESERVED!r} record. "
            "Read it with torch.load(path, weights_only=True) and pass the parts to load_state_dict"
        )
    if header["version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {header['version']}, written by a newer precision-core; this one reads {FORMAT_VERSION}"
        )
    if not {"precision", "rng"} <= header.keys():
        raise CheckpointError(f"{path} is incomplete: its {RESERVED!r} record has only {sorted(header)}")
    return content


def _verify(file: IO[bytes]) -> None:
    """Raises unless every record of the zip file matches its checksum, and leaves the file at its start."""
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
        # The one field that no checksum covers and torch reads: a record marked as a folder is taken for empty.
        marked = [record.filename for record in archive.infolist() if record.external_attr]
    if damaged or marked:
        raise CheckpointError(f"the record {damaged or marked[0]} does not match its checksum")
    file.seek(0)


def check_saveable(tree: Any, key: str = "", inside: tuple[int, ...] = ()) -> None:
    """Raises `ValueError` naming the key of the first value that `torch.load(weights_only=True)` would refuse."""
    kind = type(tree)
    if isinstance(tree, Tensor) and tree.is_meta:
        raise ValueError(f"cannot save {key or 'the state'}: it is on the meta device and has no values")
    if kind in _CONTAINERS or kind in _PLAIN:  # what was set on a tensor or an OrderedDict is saved with it
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
    try:  # whatever else: try it, so that types which were registered as safe, and tensor subclasses, are accepted
        buffer = io.BytesIO()
        torch.save(tree, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:
        way_out = (
            "Objects with state_dict are saved from dicts only: put it under a key of its own"
            if hasattr(tree, "state_dict")
            else "Save plain values (float(x), str(path), vars(args), array.tolist()), or give the object state_dict "
            "and load_state_dict"
        )
        raise ValueError(
            f"cannot save {key or 'the state'}: a {kind.__module__}.{kind.__qualname__} would be refused by a safe "
            f"load, which takes tensors, numbers, strings and containers of them. {way_out}"
        ) from error
