"""`precision new`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("path", metavar="TASK.PY", type=click.Path(dir_okay=False), default="task.py")
def new(path: str) -> None:
    """Write a task file to start from: commented, and it runs as it is."""
    from importlib.resources import files

    text = files("precision_lab").joinpath("task_template.py").read_text()
    if Path(path).suffix != ".py":
        raise click.BadParameter(f"{path!r}: expected a name that ends in .py", param_hint="TASK.PY")
    try:
        with open(path, "x") as file:
            file.write(text.removeprefix("# mypy: ignore-errors\n").replace("FILE", path))
    except FileExistsError:
        raise click.BadParameter(f"{path!r} is there already", param_hint="TASK.PY") from None
    except OSError as error:
        raise click.BadParameter(f"cannot write {path!r}: {error.strerror}", param_hint="TASK.PY") from None
    click.echo(f"{path} is written; next: precision compare {path}:make")
