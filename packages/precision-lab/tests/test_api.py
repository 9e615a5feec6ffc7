import io
import json

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from torch import nn

import precision_lab
from precision_lab.cli import main


def make():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def batches(seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            inputs = torch.randn(16, 4, generator=generator)
            yield inputs, inputs.sum(dim=1, keepdim=True)

    return model, optimizer, batches, nn.MSELoss()


def quiet():
    return Console(file=io.StringIO())


@pytest.fixture(scope="module")
def comparison():
    """A function of this file, in forks: 12 steps, every mode with two seeds."""
    modes = ["64-true", "32-true", "bf16-true"]
    return precision_lab.compare(make, modes, steps=12, seeds=2, accelerator="cpu", console=quiet())


def test_a_function_is_compared_and_the_same_dropout_is_drawn_in_every_mode(comparison):
    double, single, half = comparison.rows
    assert [row.status for row in comparison.rows] == ["done"] * 3, [row.reason for row in comparison.rows]
    assert single.losses == pytest.approx(double.losses, rel=1e-5) and single.losses[-1] < single.losses[0] / 2
    assert half.losses == pytest.approx(double.losses, rel=0.1) and half.losses != single.losses
    assert comparison.seeds_of("bf16-true") == 2 and comparison.spread() > 0
    assert (single.parameter_bytes, half.parameter_bytes, single.optimizer_bytes) == (4 * 49, 2 * 49, 0)
    assert comparison.task == "make"


def test_first_losses_are_those_of_a_plain_loop(comparison):
    torch.manual_seed(0)
    model, optimizer, batches, loss = make()
    torch.manual_seed(0)
    stream, losses = batches(0), []
    for _ in range(12):
        inputs, targets = next(stream)
        optimizer.zero_grad()
        value = loss(model(inputs), targets)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert comparison.rows[1].losses == pytest.approx(losses, rel=1e-6)


def test_it_shows_itself(comparison):
    text, markdown, html = repr(comparison), comparison._repr_markdown_(), comparison._repr_html_()
    for shown in (text, markdown, html):
        assert all(row.mode in shown and f"{row.held_out_loss:.4f}" in shown for row in comparison.rows)
    assert text.splitlines()[0].startswith("mode ") and "| mode | train |" in markdown and "<th>held-out</th>" in html
    assert comparison.rows[1].mode in text and "standard deviation of 2" in text


def test_users_errors_are_raised_with_their_traceback():
    def wrong():
        raise KeyError("mine")

    with pytest.raises(precision_lab.TaskError) as caught:
        precision_lab.compare(wrong, ["32-true"], accelerator="cpu", console=quiet())
    assert 'raise KeyError("mine")' in str(caught.value) and str(caught.value).endswith("KeyError: 'mine'")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"task": "gone.py:make"}, "there is no file 'gone.py'"),
        ({"size": "2m"}, "expected one of 1m, 25m"),
        ({"modes": "bf16-mixd"}, "bf16-mixd"),
        ({"accelerator": "abacus"}, "abacus"),
    ],
)
def test_wrong_arguments_are_errors_before_anything_runs(arguments, words):
    with pytest.raises(ValueError, match=words):
        precision_lab.compare(**arguments)


def test_new_writes_a_file_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["new", "mine.py"])
    assert result.exit_code == 0 and "precision compare mine.py:make" in result.output
    text = (tmp_path / "mine.py").read_text()
    assert text.startswith('"""What `precision compare` trains') and "mypy" not in text
    for path, words in (("mine.py", "is there already"), ("mine.txt", "ends in .py"), ("no/mine.py", "cannot write")):
        result = CliRunner().invoke(main, ["new", path])
        assert result.exit_code == 2 and words in result.output


BROKEN = """
def make():
    return 1 / 0
"""


@pytest.mark.slow_start
def test_a_file_is_compared_from_the_command_line_and_a_broken_one_says_why(tmp_path, monkeypatch):
    """The template as it is written, and one that raises: exit code 2, the user's traceback, nothing of ours."""
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    assert runner.invoke(main, ["new", "mine.py"]).exit_code == 0
    options = ["--accelerator", "cpu", "--modes", "32-true", "--seeds", "1", "--steps", "3", "--out", "out"]
    result = runner.invoke(main, ["compare", "mine.py:make", *options])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert record["task"] == "mine.py:make" and record["modes"][0]["status"] == "done"
    assert not (tmp_path / "out" / "resume").exists()

    (tmp_path / "broken.py").write_text(BROKEN)
    result = runner.invoke(main, ["compare", "broken.py:make", *options])
    assert result.exit_code == 2
    assert "ZeroDivisionError: division by zero" in result.stderr and "return 1 / 0" in result.stderr
    assert "precision_lab" not in result.stderr
