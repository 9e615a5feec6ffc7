"""What several commands check before they begin."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click


@contextmanager
def bad(option: str) -> Iterator[None]:
    """Context in which a ValueError is an error of that option."""
    try:
        yield
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=option) from None


def checked_folder(out: str) -> Path:
    """Creates the folder and writes a temporary file in it, so that errors come before the training."""
    from precision_core.checkpoint import local_path

    try:
        folder = local_path(out, "--out")
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--out") from None
    except OSError as error:
        raise click.BadParameter(f"cannot write in {out!r}: {error.strerror}", param_hint="--out") from None
    return folder
