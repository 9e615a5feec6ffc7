"""What `precision doctor` found, printed: readable in 80 columns, and in a file."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from precision_lab.doctor import Findings
from precision_lab.installed import Missing, Package
from precision_lab.machine import Device, Machine
from precision_lab.table import human_bytes

_STYLES = {"native": "green", "emulated": "yellow", "slow": "yellow", "no": "red"}
_LEGEND = (
    "native: by instructions for the format; emulated: right, but computed in a wider format; slow: right, but an "
    "order of magnitude slower; no: not at all. Strategy any: one device, and every strategy without a row of its own. "
    "How long a step takes in each mode on this machine: run precision compare."
)


def print_findings(findings: Findings, console: Console) -> None:
    """Prints the findings in sections; empty ones are left out."""
    with console.capture() as capture:
        _print_sections(findings, console)
    # Rich fills its cells with spaces, which wrap where a window is narrower, and go along when a line is copied.
    console.file.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def _print_sections(findings: Findings, console: Console) -> None:
    _section(console, "machine", _machine(findings.machine))
    _section(console, "devices", [_device(device) for device in findings.devices])
    _section(console, "packages", [_package(package) for package in findings.packages])
    vendors = [[name, version or "not installed"] for name, version in findings.vendors.items()]
    _section(console, "libraries", vendors)
    _print_missing(findings.missing, console)
    _print_support(findings, console)
    _section(console, "problems", [[f"{n}.", text] for n, text in enumerate(findings.problems, 1)], "red")
    if not findings.problems:
        console.print("no problems found")


def _machine(machine: Machine) -> list[list[str]]:
    cores = f", {machine.cores} cores" if machine.cores else ""
    return [
        ["Python", machine.python],
        ["torch", f"{machine.torch}, {machine.threads} thread{'s' * (machine.threads != 1)}"],
        ["platform", machine.platform],
        ["CPU", machine.cpu + cores],
        *([name, f"{answer.level}: {answer.reason}"] for name, answer in machine.formats.items()),
        ["memory", human_bytes(machine.memory_bytes)],
    ]


def _device(device: Device) -> list[str]:
    if device.error:
        return [device.type, f"cannot be asked: {device.error}"]
    if device.here is None:
        return [device.type, "not asked: that would import torch_xla, which is installed"]
    return [device.type, f"{device.count}: {', '.join(device.names)}" if device.here else "not here"]


def _package(package: Package) -> list[str]:
    parts = {"modes": package.modes, "strategies": package.strategies, "support": package.support}
    return [
        package.name,
        package.version,
        "; ".join(f"{what} {', '.join(each)}" for what, each in parts.items() if each),
    ]


def _section(console: Console, title: str, rows: Sequence[Sequence[str]], style: str = "") -> None:
    if not rows:
        return
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for _ in rows[0][1:]:
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # Text: brackets in an error are no markup
    console.print(title, style=f"bold {style}".strip())
    console.print(Padding(table, (0, 0, 1, 2)))


def _print_missing(missing: Sequence[Missing], console: Console) -> None:
    """Prints each command on a line of its own: it is there to be copied, and a column would cut it."""
    if not missing:
        return
    console.print("more modes and strategies, in a checkout of the project", style="bold")
    for each in missing:
        console.print(Padding(Text(", ".join(each.names)), (0, 0, 0, 2)))
        console.print(Text(f"    {each.install}"), soft_wrap=True)
    console.print()


def _print_support(findings: Findings, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("mode", overflow="fold", max_width=22)
    table.add_column("device", no_wrap=True)
    table.add_column("strategy", overflow="fold", max_width=10)
    table.add_column("level", no_wrap=True)
    table.add_column("reason", overflow="fold")
    for row in findings.support:
        level = Text(row.level, _STYLES[row.level])
        table.add_row(Text(row.mode), row.device, Text(row.strategy or "any"), level, Text(row.reason))
    console.print("support", style="bold")
    console.print(Padding(table, (0, 0, 0, 2)))
    for mode, devices in findings.unrated.items():
        console.print(Padding(Text(f"{mode} on {', '.join(devices)}: no package has a row, its dtypes decide"), (0, 2)))
    console.print(Padding(Text(_LEGEND, "dim"), (1, 2)))
