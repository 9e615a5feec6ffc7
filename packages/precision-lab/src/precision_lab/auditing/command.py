"""precision audit, from the command line."""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext, redirect_stdout

import click
from rich.console import Console

from precision_lab.auditing.script import audit_script


def run(
    script: str, arguments: list[str], steps: str, as_json: bool, html: str | None, fail_on: str, console: Console
) -> int:
    """Runs the script, prints the report, and returns the exit code.

    Raises:
        ValueError: steps is neither a positive number nor "all".
    """
    if steps != "all" and not (steps.isdecimal() and int(steps) > 0):
        raise ValueError(f"{steps!r}: expected a number of training steps, or all")
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        outcome = audit_script(script, arguments, None if steps == "all" else int(steps))
    if int(os.environ.get("RANK", "0")) == 0:
        if html is not None:
            from precision_lab.auditing.page import write_page

            write_page(outcome.report, html, script)
        if as_json:
            click.echo(json.dumps(outcome.report.as_dict(), indent=1))
        else:
            console.print()
            console.print(outcome.report)
    if outcome.traceback:
        click.echo(f"\n{script} failed:\n{outcome.traceback}", err=True)
        return 2
    if outcome.interrupted:
        return outcome.exit_code
    return 1 if fail_on != "never" and outcome.report.at(fail_on) else 0
