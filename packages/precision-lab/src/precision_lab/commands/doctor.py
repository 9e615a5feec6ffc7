"""`precision doctor`."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout, and nothing else.")
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """Show this machine, what is installed, and which precision runs here how well.

    Trains nothing, and imports no vendor library but torch. The exit code is 1 when there are problems: two packages
    claim one name, a package's rows of the support table cannot be loaded, a requirement is not met, a device's driver
    raises.
    """
    from rich.console import Console

    from precision_lab.doctor import examine
    from precision_lab.findings import print_findings

    with redirect_stdout(sys.stderr):  # whatever a package prints while it is imported
        findings = examine()
    if as_json:
        click.echo(json.dumps(findings.as_dict(), indent=1))
    else:
        print_findings(findings, Console(highlight=False))
    context.exit(1 if findings.problems else 0)
