"""`precision why`."""

from __future__ import annotations

import click

from precision_lab.commands.checks import bad


@click.command()
@click.argument("path", metavar="RUN.JSONL", type=click.Path(exists=True, dir_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout, and nothing else.")
@click.pass_context
def why(context: click.Context, /, path: str, as_json: bool) -> None:
    """Say why a run went wrong, from the file that precision_lab.watch wrote.

    An alarm that was replayed is shown with the operation, its module and line, and the remedies that were tried. Of
    others the signs: skipped steps, modules near the end of their format; and what to type to know more. The exit code
    is 1 where there was an alarm.
    """
    from rich.console import Console

    from precision_lab.explaining.command import run

    with bad("RUN.JSONL"):
        code = run(path, as_json, Console(highlight=False))
    context.exit(code)
