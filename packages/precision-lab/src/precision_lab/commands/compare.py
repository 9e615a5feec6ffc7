"""`precision compare`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from precision_lab.commands.checks import bad, checked_folder

if TYPE_CHECKING:
    from precision_lab.results import Comparison


@click.command()
@click.argument("task", metavar="[TASK.PY:FUNCTION]", required=False)
@click.option(
    "--steps", type=click.IntRange(min=1), default=300, show_default=True, help="Training steps, of each mode."
)
@click.option(
    "--modes",
    metavar="MODE,...",
    help="Precisions to compare: core's modes, policies such as params=float32,compute=bfloat16, modes of packages; "
    "+lora or +adam8bit behind one changes the task, too. Those that are named run even where they are slow. all: all "
    "that are installed. [default: all of core's]",
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 2), default=0, show_default=True, help="Of weights and batches.")
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    help="Train every mode with so many seeds. [default: 32-true with 3, for its spread, the others with one]",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False),
    default="precision-compare",
    show_default=True,
    help="Folder for report.html, compare.json and compare.png; older ones are replaced.",
)
@click.option("--all", "run_all", is_flag=True, help="Run the modes that are slow on this device, too.")
@click.option("--sequential", is_flag=True, help="One mode after another: where all do not fit into memory at once.")
@click.option("--fresh", is_flag=True, help="Start anew, whatever an interrupted run has left in the folder.")
@click.option("--size", default="1m", show_default=True, help="Parameters of the GPT: 1m, 25m, 85m, 300m or 1b.")
@click.option("--against", metavar="OLD.JSON", help="An older compare.json: show what changed.")
@click.option(
    "--devices",
    type=click.Choice(["1", "2", "4"]),
    default="1",
    show_default=True,
    help="Processes, one a device, that share each batch.",
)
@click.option(
    "--strategy",
    metavar="NAME",
    default="auto",
    show_default=True,
    help="How they do it: ddp, or one that an installed package brings (fsdp, deepspeed). auto: ddp for several.",
)
@click.option("--accelerator", default="auto", show_default=True, help="Where to train: cpu, cuda, mps, ...")
@click.pass_context
def compare(
    context: click.Context,
    /,
    task: str | None,
    modes: str | None,
    out: str,
    run_all: bool,
    sequential: bool,
    fresh: bool,
    against: str | None,
    devices: str,
    accelerator: str,
    **options: Any,
) -> None:
    """Train in each precision, from the same start, and compare: your own model, or a small GPT on real text.

    TASK.PY:FUNCTION is a function of yours that returns a precision_lab.Task (`precision new task.py` writes one).
    Prints a table and a verdict, and writes them with curves and layers (report.html), every figure (compare.json) and
    the curves alone (compare.png). Interrupted, the same command goes on where it was. The exit code is 1 when a mode
    failed.
    """
    listed = _modes(modes)
    old = None
    if against is not None:
        from precision_lab.against import read_record

        with bad("--against"):
            old = read_record(against)
    _device_type(accelerator)
    comparison = _prepared(
        task, listed, named=modes not in (None, "all"), run_slow=run_all, devices=int(devices),
        accelerator=accelerator, **options,
    )  # fmt: skip
    folder = checked_folder(out)

    from rich.console import Console

    from precision_lab.api import execute
    from precision_lab.table import print_table, print_verdict
    from precision_lab.taskfile import TaskError

    console = Console(highlight=False)
    try:
        execute(comparison, accelerator, int(devices), console, folder, sequential=sequential, fresh=fresh)
    except TaskError as error:
        click.echo(str(error), err=True)
        context.exit(2)
    for text in dict.fromkeys(comparison.tracebacks.values()):
        if "\n" in text:  # else its one line is the row's reason
            modes = ", ".join(mode for mode, other in comparison.tracebacks.items() if other == text)
            console.print(f"{modes}:\n{text}\n", markup=False, soft_wrap=True)
    print_table(comparison, console)
    print_verdict(comparison, console)
    if old is not None:
        from precision_lab.against import print_against

        print_against(comparison.as_dict(), old, console)
    console.print()
    console.print(
        ", ".join(str(folder / name) for name in ("report.html", "compare.json", "compare.png")), soft_wrap=True
    )
    context.exit(1 if comparison.failed else 0)


def _modes(modes: str | None) -> list[str]:
    from precision_lab.modes import modes_to_compare

    with bad("--modes"):
        return modes_to_compare(modes)


def _device_type(accelerator: str) -> str:
    from precision_core import Fabric

    try:
        return Fabric(accelerator=accelerator).device.type
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--accelerator") from None


def _prepared(task: str | None, modes: list[str], *, size: str, **options: Any) -> Comparison:
    from precision_lab.api import prepare
    from precision_lab.process import ChildFailed
    from precision_lab.taskfile import check_spec
    from precision_lab.train import SIZES

    if size not in SIZES:
        raise click.BadParameter(f"{size!r}: expected one of {', '.join(SIZES)}", param_hint="--size")
    if task is not None:
        with bad("TASK.PY:FUNCTION"):
            check_spec(task)
    try:
        with bad("--strategy"):
            return prepare(task, modes, size=size, **options)
    except ChildFailed as failure:
        raise click.ClickException(f"asking for {options['accelerator']}: {failure}") from None
