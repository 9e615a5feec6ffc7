"""The table at the end."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from precision_lab.results import BASELINE, REFERENCE, Comparison, Row, last_tenth, percent
from precision_lab.shown import human_bytes as human_bytes
from precision_lab.variants import VARIANTS, split_variants
from precision_lab.verdict import judge

_LOSSES = ("train", "held-out", "spreads", "drift")
_TIMES = ("ms/step", "x 32-true", "quartiles")
_COLUMNS = (*_LOSSES, *_TIMES, "trains", "params", "grads", "optimizer", "peak", "skipped")
_MODE_WIDTH = 30
"""Longer modes, policies that are written out, are folded to this width."""


def print_table(comparison: Comparison, console: Console) -> None:
    """Prints a row for each mode: its figures, or why there are none."""
    width = min(_MODE_WIDTH, max(len(row.mode) for row in comparison.rows))
    columns, finished, _ = comparison_texts(comparison)
    _print_columns(columns, finished, console, width, gap=1)
    for modes, status, reason in _without_figures(comparison):  # needs the width of all columns, no cell has that
        style = "red" if status == "failed" else "yellow"
        line = f" {escape(modes):<{width}}  [{style}]{status}: {escape(reason)}"
        console.print(line, soft_wrap=True, highlight=False)
    if finished:
        console.print()
        for line in [*notes(comparison), footnotes(comparison)]:
            console.print(line, style="dim", markup=False, highlight=False)


def _print_columns(columns: list[str], rows: list[list[str]], console: Console, first: int, gap: int) -> None:
    """Prints a table, `first` the width of its first column; a terminal that is narrower gets several tables."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    widths[0] = max(first, len(columns[0]))
    for some in _side_by_side(widths, gap + 1, console.width if console.is_terminal else None) if rows else ():
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, gap, 0, 0))
        table.add_column(columns[0], width=widths[0], overflow="fold")
        for index in some:
            table.add_column(columns[index], justify="right", no_wrap=True)
        for row in rows:
            table.add_row(escape(row[0]), *(escape(row[index]) for index in some))
        # Rich cuts what does not fit. Too long a line of a log is its reader's to wrap: no figure is lost.
        Console(file=console.file, width=1000, highlight=False).print(table)


def _side_by_side(widths: list[int], gap: int, room: int | None) -> list[list[int]]:
    """Returns which columns go into one table, beside the first: all of them, or as many as there is room for."""
    tables: list[list[int]] = [[]]
    used = widths[0] + gap
    for index, width in enumerate(widths[1:], 1):
        if room is not None and used + width + gap > room and tables[-1]:
            tables.append([])
            used = widths[0] + gap
        tables[-1].append(index)
        used += width + gap
    return tables


def _cells(row: Row, comparison: Comparison) -> list[str]:
    drift = comparison.drift(row)
    ratio, quartiles = comparison.time_ratio(row), comparison.time_quartiles(row)
    seconds, spreads = row.median_step_seconds, comparison.in_spreads(row)
    return [
        "-" if row.train_loss is None else f"{row.train_loss:.4f}",
        "-" if row.held_out_loss is None else f"{row.held_out_loss:.4f}",
        "-" if spreads is None else f"{spreads:+.1f}",
        "-" if drift is None else "0" if drift == 0 else f"{drift:.1e}",
        "-" if seconds is None else f"{1000 * seconds:.1f}",
        "-" if ratio is None else f"{ratio:.2f}",
        "-" if quartiles is None else f"{quartiles[0]:.2f}-{quartiles[1]:.2f}",
        "-" if row.trains is None else percent(row.trains),
        human_bytes(row.parameter_bytes),
        human_bytes(row.gradient_bytes),
        human_bytes(row.optimizer_bytes),
        human_bytes(row.peak_memory_bytes),
        "-" if row.skipped_steps is None else str(row.skipped_steps),
    ]


def footnotes(comparison: Comparison) -> str:
    """Returns what the columns are, in this comparison."""
    tenth = last_tenth(comparison.steps)
    unit = "" if comparison.task else "losses in nats per byte, "
    drift = "max over steps of |L - L64| / L64, L64 being 64-true's training loss"
    if comparison.find(REFERENCE) is None:
        drift += " (-: 64-true is not among the finished modes; add it to --modes)"
    spread, seeds = comparison.spread(), comparison.seeds_of(BASELINE)
    spreads = "spreads: held-out minus 32-true's, in standard deviations of 32-true's over seeds"
    spreads += " (-: needs two seeds of it)" if spread is None else f" ({spread:.2g}, of {seeds})"
    ratio = "" if comparison.find(BASELINE) else "; x 32-true: - as 32-true is not among the finished modes"
    if comparison.find(BASELINE) and comparison.block is not None:
        ratio = f"; x 32-true: median, and quartiles, of turns of {comparison.block} steps that were taken side by side"
    on_cuda = comparison.environment.get("device") == "cuda"
    whose = "tensors' memory on the device" if on_cuda else "the process's memory"
    kernels = ", of deterministic kernels: attention's backward is slower than by default" if on_cuda else ""
    clock = "median of CPU time" if comparison.environment.get("clock") == "cpu" else "median"
    trains = "trains: share of the parameters; " if _some_are_frozen(comparison) else ""
    return (
        f"{unit}train: mean of the last {tenth} step{'s' if tenth > 1 else ''}; {spreads}; drift: {drift}; "
        f"ms/step: {clock}{kernels}{ratio}; {trains}peak: growth of {whose} from before the model was built"
    )


def _without_figures(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Returns (modes, status, reason) of those that did not finish; the same reason once."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in comparison.rows:
        if row.status != "done":
            found.setdefault((row.status, row.reason), []).append(row.mode)
    return [(", ".join(modes), status, reason) for (status, reason), modes in found.items()]


def notes(comparison: Comparison) -> list[str]:
    """Returns what to know of some rows: what a variant does to the task, and of which modes the time says nothing."""
    done = [row for row in comparison.rows if row.status == "done"]
    used = {name for row in done for name in split_variants(row.mode)[1]}
    lines = [f"+{name}: {what}" for name, what in VARIANTS.items() if name in used]
    for note in dict.fromkeys(row.note for row in done if row.note):
        lines.append(f"{', '.join(row.mode for row in done if row.note == note)}: {note}")
    return lines


def _some_are_frozen(comparison: Comparison) -> bool:
    """Whether a row trains fewer parameters than the task does."""
    return len({row.trains for row in comparison.rows if row.status == "done"}) > 1


def print_verdict(comparison: Comparison, console: Console) -> None:
    """Prints what to take, and why."""
    if any(row.status == "done" for row in comparison.rows):
        verdict = judge(comparison)
        console.print()
        console.print(verdict.headline, style="bold", markup=False)
        for sentence in verdict.sentences:
            console.print(f"  {sentence}", markup=False, highlight=False, soft_wrap=True)


def comparison_texts(comparison: Comparison) -> tuple[list[str], list[list[str]], list[str]]:
    """Returns columns, rows of texts, and the lines below them: the verdict, and why modes have no figures."""
    rows = [[row.mode, *_cells(row, comparison)] for row in comparison.rows if row.status == "done"]
    columns = ["mode", *_COLUMNS]
    if not _some_are_frozen(comparison):
        for cells in (columns, *rows):
            del cells[_COLUMNS.index("trains") + 1]
    lines = [f"{modes} {status}: {reason}" for modes, status, reason in _without_figures(comparison)]
    if rows:
        verdict = judge(comparison)
        lines = [f"{verdict.headline}.", *verdict.sentences, *lines, *notes(comparison)]
    return columns, rows, lines


def print_texts(columns: list[str], rows: list[list[str]], lines: list[str], console: Console) -> None:
    """Prints a table of texts, uncut, and the lines below it."""
    longest = max((len(row[0]) for row in rows), default=0)
    _print_columns(columns, rows, console, min(longest, _MODE_WIDTH) if console.is_terminal else longest, gap=2)
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
