"""`precision estimate`."""

from __future__ import annotations

import json
from typing import Any

import click


@click.command()
@click.argument("task", metavar="[TASK.PY:FUNCTION]", required=False)
@click.option("--modes", "--mode", metavar="MODE,...", help="As for compare. [default: all of core's]")
@click.option(
    "--strategy", default="single_device", show_default=True, help="single_device, ddp, fsdp, deepspeed or xla."
)
@click.option("--devices", type=click.IntRange(min=1), default=1, show_default=True, help="Processes, one a device.")
@click.option("--fit", metavar="24GB", help="What there is room for: say which modes fit.")
@click.option("--hf", metavar="CONFIG.JSON", help="The causal language model of a Hugging Face config, with AdamW.")
@click.option("--batch", default="1x2048", show_default=True, help="Of --hf: sequences x tokens.")
@click.option("--size", default="1m", show_default=True, help="Parameters of the GPT: 1m, 25m, 85m, 300m or 1b.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout, and nothing else.")
@click.pass_context
def estimate(context: click.Context, /, task: str | None, modes: str | None, as_json: bool, **options: Any) -> None:
    """Say how much memory a training step takes in each precision, by kind, before anything is allocated.

    The step is traced with tensors that have no values: no GPU is needed, nor memory for the model. Exits with 1 where
    no mode could be estimated.
    """
    from rich.console import Console

    from precision_lab.estimates import estimate
    from precision_lab.table import print_texts
    from precision_lab.taskfile import TaskError

    try:
        found = estimate(task, modes, **options)
    except TaskError as error:
        click.echo(str(error), err=True)
        context.exit(2)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except ImportError as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=1))
    else:
        print_texts(*found.table(), Console(highlight=False))
    context.exit(1 if all(row.reason for row in found.rows) else 0)
