"""`precision why`."""

from __future__ import annotations

import click

from precision_lab.commands.checks import bad


@click.command()
@click.argument("paths", metavar="RUN.JSONL", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout, and nothing else.")
@click.pass_context
def why(context: click.Context, /, paths: tuple[str, ...], as_json: bool) -> None:
    """Say why a run went wrong, from the file that precision_lab.watch wrote.

    An alarm that was replayed is shown with the operation, its module and line, and the remedies that were tried. Of
    others the signs: skipped steps, modules near the end of their format; and what to type to know more. Files of other
    ranks (run.rank1.jsonl) are found beside it, or given, too: which rank was first is said. The exit code is 1 where
    there was an alarm.
    """
    from rich.console import Console

    from precision_lab.explaining.command import run

    with bad("RUN.JSONL"):
        code = run(paths, as_json, Console(highlight=False))
    context.exit(code)
