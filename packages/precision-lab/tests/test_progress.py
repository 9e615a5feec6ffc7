import io

from rich.console import Console

from precision_lab.progress import Bars, Lines, make_progress
from precision_lab.results import Row


def run(console, steps):
    row, broken = Row("32-true"), Row("16-true")
    rows = [row, broken, Row("16-mixed", reason="slow")]
    with make_progress(console, rows, steps) as progress:
        progress.start(row)
        progress.update(row)
        for step in range(steps):
            row.losses.append(5 - step / steps)
            progress.update(row)
        progress.update(row)
        row.status = "done"
        progress.end(row)
        progress.start(broken)
        broken.status, broken.reason = "failed", "broke"
        progress.end(broken)
    return progress, console.file.getvalue()


def test_a_log_gets_a_line_for_each_tenth():
    progress, text = run(Console(file=io.StringIO()), 200)
    assert isinstance(progress, Lines)
    assert "\x1b" not in text
    lines = text.splitlines()
    assert len(lines) == 1 + 10 + 1 + 2
    assert lines[1].endswith("step  20/200  loss 4.905")
    assert lines[10].endswith("step 200/200  loss 4.005")
    assert lines[-1].endswith("failed: broke")


def test_few_steps_are_not_printed_twice():
    _, text = run(Console(file=io.StringIO()), 3)
    assert text.count("3/3") == text.count("1/3") == 1


def test_a_terminal_gets_bars():
    console = Console(file=io.StringIO(), force_terminal=True, width=100, _environ={"TERM": "xterm"})
    progress, text = run(console, 20)
    assert isinstance(progress, Bars)
    assert "20/20" in text
    assert "failed" in text
