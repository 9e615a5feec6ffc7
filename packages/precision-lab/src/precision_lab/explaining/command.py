"""precision why, from the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence

import click
from rich.console import Console

from precision_lab.explaining.symptoms import symptoms


def run(paths: Sequence[str], as_json: bool, console: Console) -> int:
    """Prints what files of `precision watch` tell, and returns the exit code: 1 where the run went wrong.

    Raises:
        ValueError: one is no such file.
    """
    found = symptoms(*paths)
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=1))
    else:
        console.print(found)
    return 1 if found.alarms or found.findings or found.type else 0
