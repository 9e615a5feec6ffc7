"""The `precision` command."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from precision_lab.results import Comparison

# Each command imports what it needs when it runs: torch takes seconds, --help should not.


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="precision-lab")
def main() -> None:
    """Find out which number formats run here, and what they do to training, by measuring it."""


@main.command()
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

        with _bad("--against"):
            old = read_record(against)
    _device_type(accelerator)
    comparison = _prepared(
        task, listed, named=modes not in (None, "all"), run_slow=run_all, devices=int(devices),
        accelerator=accelerator, **options,
    )  # fmt: skip
    folder = _checked_folder(out)

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


@main.command()
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


@main.command()
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

    _checked_folder(str(Path(out).parent))
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


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
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

    with _bad("--steps"):
        code = run(script, list(arguments), steps, as_json, html, fail_on, Console(highlight=False))
    context.exit(code)


@main.command()
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

    with _bad("RUN.JSONL"):
        code = run(paths, as_json, Console(highlight=False))
    context.exit(code)


@main.command()
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


@main.command()
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


@contextmanager
def _bad(option: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=option) from None


def _modes(modes: str | None) -> list[str]:
    from precision_lab.modes import modes_to_compare

    with _bad("--modes"):
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
        with _bad("TASK.PY:FUNCTION"):
            check_spec(task)
    try:
        with _bad("--strategy"):
            return prepare(task, modes, size=size, **options)
    except ChildFailed as failure:
        raise click.ClickException(f"asking for {options['accelerator']}: {failure}") from None


def _checked_folder(out: str) -> Path:
    """Creates the folder and writes a temporary file in it, so that errors come before the training."""
    from precision_core.checkpoint import local_path

    try:
        folder = local_path(out, "--out")
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--out") from None
    except OSError as error:
        raise click.BadParameter(f"cannot write in {out!r}: {error.strerror}", param_hint="--out") from None
    return folder


if __name__ == "__main__":
    main()
