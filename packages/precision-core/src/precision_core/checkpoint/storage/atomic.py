"""Replaces a file in one step: its path always has the old or the new file, complete, also after a crash.

Folders cannot be replaced in one step: how they are is in manifest.py.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: temporary files of crashed writers stay, as there is no lock to tell them by
    fcntl = None  # type: ignore[assignment]

_SUFFIX = ".partial"
_UNFINISHED = re.compile(r"\.(.+)\.[0-9a-z]{16}\.partial", re.DOTALL)


@contextlib.contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Context with a temporary file name to write to; at its end the file replaces `path`, on an error it is removed.

    The file is in a temporary folder beside `path`, locked while this process lives; temporary files of crashed
    writers are removed. The new file gets the permissions that the umask gives.

    Raises:
        OSError: a full disk, no permission, a folder at `path`; names `path`, keeps the errno. The old file stays.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: remove it, or save to another path, {path / 'last.ckpt'} say")
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(path.parent, lambda name: name == path.name)
            _forget(path)
            folder = _create_folder(path, stack)
            new = folder / path.name
            yield new
            with open(folder / ".new", "xb") as other, open(new, "r+b") as file:
                os.fsync(file.fileno())
                mode = stat.S_IMODE(os.fstat(other.fileno()).st_mode)
            os.chmod(new, mode)
            os.replace(new, path)
            sync_folder(path.parent)
        except BaseException as error:
            cause = _os_error(error)
            if cause is None:
                raise
            reason = cause.strerror or str(cause)
            kept = "; the old file is as it was" if path.is_file() else ""
            raise OSError(cause.errno, f"could not write {path}: {reason}{kept}") from error


@contextlib.contextmanager
def synced(path: Path) -> Iterator[BinaryIO]:
    """Context with a new binary file, which is flushed and synced to disk at its end."""
    with open(path, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _create_folder(path: Path, stack: contextlib.ExitStack) -> Path:
    """Returns a new locked folder beside `path`; `stack` removes it."""
    while True:
        folder = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_SUFFIX}")
        folder.mkdir()
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        if fcntl is None:
            return folder
        with contextlib.suppress(FileNotFoundError):  # else another writer removed it before it was locked
            lock = stack.enter_context(_opened(folder))
            with contextlib.suppress(OSError):  # a file system without locks: nothing is ever removed
                fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder


def _forget(path: Path) -> None:
    """Drops the old file from the page cache, so that the new one can use that memory.

    It will not be read again. A GB took 2.0 to 4.1 s without this and 1.1 to 1.3 s with it, on a virtual machine that
    has to ask its host for fresh memory; 1.0 to 3.0 s take torch.save alone, onto the same file and without fsync.
    """
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _os_error(error: BaseException) -> OSError | None:
    """Returns the OSError behind `error`, if any: torch's writer raises another error while it handles one."""
    found: BaseException | None = error
    while isinstance(found, Exception):
        if isinstance(found, OSError):
            return found
        found = found.__context__
    return None


def remove_abandoned(folder: Path, is_ours: Callable[[str], object]) -> None:
    """Removes the temporary files of crashed writers of those files in `folder` whose names satisfy `is_ours`.

    Those of live writers are locked; a lock ends with its process, by kill -9 too.
    """
    if fcntl is None:
        return
    for abandoned in list(folder.iterdir()):
        match = _UNFINISHED.fullmatch(abandoned.name)
        if match is None or not is_ours(match[1]):
            continue
        with contextlib.suppress(OSError), _opened(abandoned) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: somebody is writing it
            shutil.rmtree(abandoned) if abandoned.is_dir() else abandoned.unlink()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Syncs a folder, so that a new name in it survives a crash (older checkpoints may be deleted next)."""
    with contextlib.suppress(OSError), _opened(folder) as descriptor:
        os.fsync(descriptor)
