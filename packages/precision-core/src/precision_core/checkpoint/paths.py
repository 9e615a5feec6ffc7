"""Local paths: what a user passes as a path, as a `Path`; addresses of remote storage are an error.

`pathlib` takes "s3://bucket/x" for a folder "s3:", and "~" for a folder "~": the checkpoint would not be found again.
"""

from __future__ import annotations

import os
import re
from os import PathLike
from pathlib import Path
from urllib.parse import unquote

_FILE = re.compile(r"file:/{1,2}", re.IGNORECASE)
_SCHEME = re.compile(r"(?:[a-z][\w+.-]*::)*([a-z][\w+.-]+):/", re.IGNORECASE)
"""At least two letters: one is a Windows drive. One slash: `Path` turns two into one."""


def local_path(path: str | PathLike[str], call: str) -> Path:
    """Returns `path` as a `Path`: `~` is the home folder, "file:///data/x" is /data/x.

    Raises:
        ValueError: an address ("s3://bucket/x"), or the home of an unknown user; the message names `call`.
        TypeError: neither str nor os.PathLike.
    """
    if not isinstance(path, (str, PathLike)):
        raise TypeError(f"{call}(path, ...): path must be a str or a path object, not {type(path).__name__}")
    what = f"{call}({str(path)!r})"
    text = str(path)  # first: a cloud library's path objects may fetch a file when they are asked for a local one
    if match := _FILE.match(text):
        return _of_file_address(text[match.end() :], has_host=match[0].endswith("//"), what=what)
    match = _SCHEME.match(text)
    if match or "://" in text:
        scheme = match[1] if match else text.partition("://")[0].rpartition("/")[2]
        raise ValueError(
            f"{what}: {scheme}:// addresses are not supported. Pass a local path (checkpoints/last.ckpt, ~/last.ckpt, "
            "file:///data/last.ckpt), and copy with the storage's own tool or mount it. (For a local folder of that "
            "name pass an absolute path) [path-address]"
        )
    text = os.fspath(path)
    if isinstance(text, str) and text.startswith("~"):
        return _at_home(text, what)
    found = Path(text)
    return found.absolute() if str(found).startswith("~") else found  # "./~" is a folder here, and stays one


def _of_file_address(rest: str, has_host: bool, what: str) -> Path:
    host, slash, path = rest.partition("/") if has_host else ("", "/", rest)
    if not slash or host.lower() not in ("", "localhost"):
        raise ValueError(
            f"{what}: file:// is followed by a host name, and {host!r} is not this machine. A local file has three "
            "slashes: file:///data/last.ckpt"
        )
    path = unquote(path)
    return Path(path if re.match(r"[a-z]:", path, re.IGNORECASE) and os.name == "nt" else f"/{path}")


def _at_home(text: str, what: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        user, *inside = Path(text).parts
        if user != "~" and not inside:  # a file of that name, as editors leave them
            return Path(text).absolute()
        raise ValueError(f"{what}: there is no user {user} on this machine. Write the path without it") from error
