import io

import pytest
from rich.console import Console

from precision_lab.results import Comparison, Row
from precision_lab.table import human_bytes, print_table, print_texts

LONG = "ValueError: " + "why " * 60 + "[red]really[/red]"


def figures(mode, losses):
    size = 1_272_640 * 4
    return Row(
        mode, "done", "", losses, [0.05] * len(losses), 2.34567, size, size, 2 * size, 100 * 2**20, 3
    )  # fmt: skip


def printed(rows, width=80, device="cpu"):
    text = io.StringIO()
    print_table(Comparison(2, 0, rows, environment={"device": device}), Console(file=text, width=width))
    return text.getvalue()


def test_a_finished_mode_has_its_figures_uncut_on_a_narrow_terminal():
    text = printed([figures("64-true", [4.0, 2.0]), figures("32-true", [4.0, 2.1])], width=60)
    line = next(line for line in text.splitlines() if line.strip().startswith("32-true"))
    assert " ".join(line.split()) == "32-true 2.1000 2.3457 - 5.0e-02 50.0 1.00 - 4.85 MiB 4.85 MiB 9.71 MiB 100 MiB 3"


def test_other_modes_say_why_in_one_line():
    rows = [figures("32-true", [4.0]), Row("16-true", "failed", LONG), Row("16-mixed", reason="slow")]
    lines = [" ".join(line.split()) for line in printed(rows).splitlines()]
    assert f"16-true failed: {LONG}" in lines
    assert "16-mixed not run: slow" in lines


def test_footnotes_explain_missing_figures():
    text = " ".join(printed([figures("bf16-mixed", [4.0])]).split())
    assert "drift: max over steps of |L - L64| / L64, L64 being 64-true's training loss (-: 64-true is not" in text
    assert "x 32-true: - as 32-true is not among the finished modes" in text


def test_footnotes_say_what_is_measured_on_a_gpu():
    """Deterministic algorithms choose other kernels there: who reads the times has to know."""
    rows = [figures("32-true", [4.0])]
    gpu, cpu = (" ".join(printed(rows, device=device).split()) for device in ("cuda", "cpu"))
    assert "ms/step: median, of deterministic kernels: attention's backward is slower" in gpu
    assert "peak: growth of tensors' memory on the device" in gpu
    assert "deterministic" not in cpu and "peak: growth of the process's memory" in cpu


def test_a_table_without_a_finished_mode():
    assert "failed: broke" in printed([Row("32-true", "failed", "broke")])


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, "-"), (0, "0 B"), (999, "999 B"), (5_090_560, "4.85 MiB"), (104_857_600, "100 MiB"), (3 * 2**30, "3 GiB")],
)
def test_human_bytes(number, text):
    assert human_bytes(number) == text


def test_a_narrow_terminal_has_all_figures_in_tables_that_fit():
    text = io.StringIO()
    rows = [[f"mode-{index}", *(f"{column}{index}" * 3 for column in "abcdefgh")] for index in range(2)]
    print_texts(
        ["mode", *"abcdefgh"], rows, ["end"], Console(file=text, width=40, force_terminal=True, color_system=None)
    )
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 40 and sum(line.split()[:1] == ["mode-1"] for line in lines) == 3
    assert all(cell in text.getvalue() for row in rows for cell in row)
