"""`precision choose`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from precision_lab.commands.checks import checked_folder


@click.command()
@click.argument("task", metavar="[TASK.PY:FUNCTION]", required=False)
@click.option("--modes", metavar="MODE,...", help="Precisions to choose from, as for compare. [default: all of core's]")
@click.option("--fit", metavar="24GB", help="What there is room for: nothing larger is chosen.")
@click.option(
    "--prefer", type=click.Choice(["memory", "speed"]), default="memory", show_default=True, help="What to save."
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=300,
    show_default=True,
    help="Training steps that are judged: as many as yours, or as you can wait for.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**31 - 2000), default=0, show_default=True, help="The first of all seeds."
)
@click.option(
    "--seeds", type=click.IntRange(min=5), default=16, show_default=True, help="The most that a mode is judged with."
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False),
    default="precision.json",
    show_default=True,
    help='The file that Fabric(precision="auto") reads; an older one is replaced.',
)
@click.option("--all", "run_slow", is_flag=True, help="Also the modes that are slow on this device.")
@click.option(
    "--sequential", is_flag=True, help="Race one mode after another: where all do not fit into memory at once."
)
@click.option("--fresh", is_flag=True, help="Start anew, whatever an interrupted run has left.")
@click.option("--size", default="1m", show_default=True, help="Parameters of the GPT: 1m, 25m, 85m, 300m or 1b.")
@click.option("--accelerator", default="auto", show_default=True, help="Where to train: cpu, cuda, mps, ...")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout, and nothing else.")
@click.pass_context
def choose(context: click.Context, /, task: str | None, out: str, as_json: bool, **options: Any) -> None:
    """Find the cheapest precision whose training stays within float32's spread over seeds, with exceptions if needed.

    Prints the precision= string, the reason for each exception, what it costs and saves, and what was not tested; and
    writes a file from which Fabric(precision="auto") takes it. Interrupted, the same command goes on where it was. The
    exit code is 1 where there is no answer: not even 32-true fits, or trains.
    """
    from dataclasses import asdict

    from rich.console import Console

    from precision_lab.chooser import choose
    from precision_lab.process import ChildFailed
    from precision_lab.table import print_texts
    from precision_lab.taskfile import TaskError

    checked_folder(str(Path(out).parent))
    console = Console(highlight=False)
    try:
        choice = choose(task, out=out, console=Console(stderr=True, highlight=False) if as_json else console, **options)
    except TaskError as error:
        click.echo(str(error), err=True)
        context.exit(2)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except ChildFailed as failure:
        raise click.ClickException(str(failure)) from None
    if not choice.precision:  # else what failed is a finding, and its reason says enough
        for mode, text in choice.tracebacks.items():
            click.echo(f"{mode}:\n{text}\n", err=True)
    if as_json:
        click.echo(json.dumps(asdict(choice), indent=1))
    else:
        print_texts(*choice.table(), console)
    context.exit(0 if choice.precision else 1)
