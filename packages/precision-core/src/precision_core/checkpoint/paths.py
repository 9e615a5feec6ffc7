"""Local paths: what a user names a file by, as a path of this machine; addresses of elsewhere are refused.

To `pathlib` "s3://bucket/x" is a folder "s3:", and "~" one of that name: a checkpoint would land where nobody looks.
"""

from __future__ import annotations

import os
import re
from os import PathLike
from pathlib import Path
from urllib.parse import unquote

_FILE = re.compile(r"file:/{1,2}", re.IGNORECASE)
_SCHEME = re.compile(r"(?:[a-z][\w+.-]*::)*([a-z][\w+.-]+):/", re.IGNORECASE)
"""Of two letters or more, as one is a drive of Windows; with one slash, which is what `Path` makes of two."""


def local_path(path: str | PathLike[str], call: str) -> Path:
    """Returns the path that `path` names: `~` is home, and "file:///data/x" is /data/x.

    Raises:
        ValueError: it has the form of an address ("s3://bucket/x"), or its home is nobody's; names `call`.
        TypeError: neither text nor a path.
    """
    if not isinstance(path, (str, PathLike)):
        raise TypeError(f"{call}(path, ...): a path comes first, and this is a {type(path).__name__}")
    said = f"{call}({str(path)!r})"
    text = str(path)  # first: a cloud library's path objects may fetch a file when they are asked for a local one
    if match := _FILE.match(text):
        return _of_file_address(text[match.end() :], has_host=match[0].endswith("//"), said=said)
    match = _SCHEME.match(text)
    if match or "://" in text:
        scheme = match[1] if match else text.partition("://")[0].rpartition("/")[2]
        raise ValueError(
            f"{said}: {scheme}:// is an address, and a path of this machine is expected, as checkpoints/last.ckpt, "
            "~/last.ckpt or file:///data/last.ckpt. Copy between the two with the storage's own tool, or mount it. "
            "(A folder of such a name: write it as an absolute path)"
        )
    text = os.fspath(path)
    if isinstance(text, str) and text.startswith("~"):
        return _at_home(text, said)
    found = Path(text)
    return found.absolute() if str(found).startswith("~") else found  # "./~" is a folder here, and stays one


def _of_file_address(rest: str, has_host: bool, said: str) -> Path:
    host, slash, path = rest.partition("/") if has_host else ("", "/", rest)
    if not slash or host.lower() not in ("", "localhost"):
        raise ValueError(
            f"{said}: what follows file:// is a machine's name, and {host!r} is not this one's. Of a file of this "
            "machine the whole path follows three slashes: file:///data/last.ckpt"
        )
    path = unquote(path)
    return Path(path if re.match(r"[a-z]:", path, re.IGNORECASE) and os.name == "nt" else f"/{path}")


def _at_home(text: str, said: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        user, *inside = Path(text).parts
        if user != "~" and not inside:  # a file of that name, as editors leave them
            return Path(text).absolute()
        raise ValueError(f"{said}: {user} is no user's home on this machine. Write the path without it") from error
