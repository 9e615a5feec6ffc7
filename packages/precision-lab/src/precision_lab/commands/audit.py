"""`precision audit`."""

from __future__ import annotations

import click

from precision_lab.commands.checks import bad


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("script", metavar="SCRIPT.PY", type=click.Path(exists=True, dir_okay=False))
@click.argument("arguments", metavar="[ARGUMENTS OF THE SCRIPT]...", nargs=-1, type=click.UNPROCESSED)
@click.option("--steps", default="2", show_default=True, help="Training steps to run, or all: to the script's end.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object to stdout; what the script prints: stderr."
)
@click.option("--html", metavar="PAGE.HTML", help="Write a page, too: one file without network.")
@click.option(
    "--fail-on",
    type=click.Choice(["warning", "error", "never"]),
    default="never",
    show_default=True,
    help="Exit with 1 where there are findings of this level or above.",
)
@click.pass_context
def audit(
    context: click.Context,
    /,
    script: str,
    arguments: tuple[str, ...],
    steps: str,
    as_json: bool,
    html: str | None,
    fail_on: str,
) -> None:
    """Run a training script unchanged, and say in which precision it really trains, and what is wrong with that.

    Options of this command stand before the script, all after it are the script's. After two training steps the script
    is ended. The exit code is 2 where it failed.
    """
    from rich.console import Console

    from precision_lab.auditing.command import run

    with bad("--steps"):
        code = run(script, list(arguments), steps, as_json, html, fail_on, Console(highlight=False))
    context.exit(code)
