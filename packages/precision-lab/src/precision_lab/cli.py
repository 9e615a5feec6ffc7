"""The `precision` command."""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from precision_lab.results import Row

# Each command imports what it needs when it runs: torch takes seconds, --help should not.


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="precision-lab")
def main() -> None:
    """Find out which number formats run here, and what they do to training, by measuring it."""


@main.command()
@click.option(
    "--steps", type=click.IntRange(min=1), default=300, show_default=True, help="Training steps, of each mode."
)
@click.option(
    "--modes",
    metavar="MODE,...",
    help="Precisions to compare: core's modes, policies such as params=float32,compute=bfloat16, modes of packages. "
    "Those that are named run even where they are slow. [default: all of core's, slow ones left out]",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of weights and batches.")
@click.option(
    "--out",
    type=click.Path(file_okay=False),
    default="precision-compare",
    show_default=True,
    help="Folder for compare.json and compare.png; older ones are replaced.",
)
@click.option("--all", "run_all", is_flag=True, help="Run the modes that are slow on this device, too.")
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
    steps: int,
    modes: str | None,
    seed: int,
    out: str,
    run_all: bool,
    devices: str,
    strategy: str,
    accelerator: str,
) -> None:
    """Train a small GPT on real text in each precision, from the same seed, and compare.

    Prints a table, and writes its figures with every step's loss (compare.json) and the curves (compare.png). The exit
    code is 1 when a mode failed.
    """
    listed = _modes(modes)
    device_type = _device_type(accelerator)
    rows = _rows(
        listed, device_type, named=modes is not None, run_slow=run_all, strategy=strategy, devices=int(devices)
    )
    folder = _checked_folder(out)

    from rich.console import Console

    from precision_lab.compare import run
    from precision_lab.plot import save_plot
    from precision_lab.progress import make_progress
    from precision_lab.results import Comparison
    from precision_lab.table import print_table
    from precision_lab.train import settings

    console = Console(highlight=False)
    comparison = Comparison(steps, seed, rows, strategy)
    with make_progress(console, rows, steps) as progress:
        run(comparison, accelerator, progress, int(devices))

    record = comparison.as_dict(settings())
    (folder / "compare.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    save_plot(comparison, folder / "compare.png")
    print_table(comparison, console)
    console.print(f"{folder / 'compare.json'}, {folder / 'compare.png'}", soft_wrap=True)
    context.exit(1 if comparison.failed else 0)


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


def _modes(modes: str | None) -> list[str]:
    from precision_lab.modes import default_modes, parse_modes

    try:
        return default_modes() if modes is None else parse_modes(modes)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--modes") from None


def _device_type(accelerator: str) -> str:
    from precision_core import Fabric

    try:
        return Fabric(accelerator=accelerator).device.type
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--accelerator") from None


def _rows(modes: list[str], device_type: str, **options: Any) -> list[Row]:
    from precision_lab.process import ChildFailed
    from precision_lab.rows import ask_for_rows

    try:
        return ask_for_rows(modes, device_type, **options)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--strategy") from None
    except ChildFailed as failure:
        raise click.ClickException(f"asking for {device_type}: {failure}") from None


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
