import io
import json
from functools import cache

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from torch import nn

import precision_lab
from precision_core import Fabric
from precision_core.hardware import FORMATS
from precision_core.support import read_chosen
from precision_lab import chooser, contest
from precision_lab.cli import main
from precision_lab.exceptions import Exceptions
from precision_lab.process import Fork
from precision_lab.runs import Runs
from precision_lab.taskfile import guarded


@pytest.fixture(autouse=True)
def fast_in_bfloat16(monkeypatch):
    """A CPU that is fast in bfloat16 and slow in float16, whatever this one is."""
    monkeypatch.setitem(FORMATS["cpu"], torch.bfloat16, lambda: ("native", "said so"))
    monkeypatch.setitem(FORMATS["cpu"], torch.float16, lambda: ("slow", "said so"))


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


@cache
def ones():
    """Kept from one call to the next, as users keep their data: what an estimate makes must not come out in a run."""
    return torch.ones(4, 1)


def make_task(worse=0.0, rate=0.1, model=net):
    """A net whose held-out loss is spread by its seed, and is `worse` where its first layer is in bfloat16."""
    model = model()
    spread = float(torch.rand(()))

    def batches(seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            inputs = torch.randn(8, 4, generator=generator)
            yield inputs, inputs @ ones()

    def evaluate(model):
        return 1 + spread + worse * (next(model.parameters()).dtype is torch.bfloat16)

    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    return precision_lab.Task(model, optimizer, batches, nn.MSELoss(), evaluate)


def choose(make, modes, text=None, **options):
    console = Console(file=text or io.StringIO(), width=200)
    return precision_lab.choose(make, modes, steps=4, accelerator="cpu", console=console, **options)


@pytest.fixture(scope="module")
def safe(tmp_path_factory):
    """Nothing differs: the cheapest that runs is the answer."""
    out = tmp_path_factory.mktemp("safe") / "precision.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FORMATS["cpu"], torch.bfloat16, lambda: ("native", "said so"))
        patch.setitem(FORMATS["cpu"], torch.float16, lambda: ("slow", "said so"))
        return choose(make_task, ["16-mixed", "32-true", "bf16-true", "64-true"], out=out), out


def test_the_cheapest_that_is_safe_is_chosen_with_what_it_costs_and_saves(safe):
    choice, _ = safe
    assert choice.precision == "bf16-true" and choice.reasons == {}
    half, single = choice.find("bf16-true"), choice.find("32-true")
    assert (half.judged, single.judged) == ("safe", "reference") and half.bytes < 0.7 * single.bytes
    assert (half.evidence.seeds, half.evidence.difference) == (5, 0.0) and half.evidence.spread > 0.05
    saved = f"saves {1 - half.bytes / single.bytes:.0%} of the estimated peak bytes"
    lines = choice.lines()
    assert lines[0] == 'precision="bf16-true"' and saved in lines[1]
    assert lines[1].startswith("costs +0 held-out loss (up to +0), where 32-true itself has a standard deviation of")
    assert "5 seeds, 4 steps" in lines[1] and "x the time of a step" in lines[1]
    assert choice.find("64-true") is None  # costs more than 32-true, always


def test_it_shows_itself(safe):
    choice, out = safe
    for shown in (repr(choice), choice._repr_markdown_(), choice._repr_html_()):
        assert "bf16-true" in shown and "reference" in shown and "more than 4 steps" in shown
    assert f"written to {out}" in repr(choice)


def test_fabric_takes_what_was_written_for_this_model_alone(safe):
    _, out = safe
    fabric = Fabric("cpu", precision=f"auto:{out}")
    assert fabric.precision_plugin.mode == "bf16-true"
    assert next(fabric.setup(net()).parameters()).dtype is torch.bfloat16
    with pytest.raises(ValueError, match="another model"):
        fabric.setup(nn.Linear(4, 1))
    measured = json.loads(out.read_text())["measured"]
    assert measured["steps"] == 4 and len(measured["candidates"]) == 3
    assert read_chosen(f"auto:{out}").made_by == "precision_lab.choose(make_task, steps=4)"


def test_what_is_slow_and_was_not_named_is_not_tested():
    choice = choose(make_task, None, fit="100B")
    assert "16-true, 16-mixed, 16-master: said so; --all runs it" in choice.untested
    assert choice.precision == "" and choice.lines()[0] == "No answer"
    assert all("does not fit" in each.reason for each in choice.candidates if each.judged != "reference")


def test_a_worse_one_is_not_taken_however_cheap():
    text = io.StringIO()
    choice = choose(lambda: make_task(worse=2.0), ["32-true", "bf16-true", "bf16-mixed"], text)
    assert choice.find("bf16-true").judged == "worse"
    assert "standard deviations of 32-true after 4 steps" in choice.find("bf16-true").reason  # the race saw it
    assert choice.precision in ("bf16-mixed", "32-true") and "bf16-true, seed 1000" not in text.getvalue()


def test_undecided_is_not_safe():
    """A difference of about one standard deviation: few seeds do not tell it apart, and 32-true is the answer."""
    choice = choose(lambda: make_task(worse=0.25), ["32-true", "bf16-true"], seeds=5)
    half = choice.find("bf16-true")
    assert half.judged == "undecided" and "with 5 seeds" in half.reason, half
    assert choice.precision == "32-true" and half.evidence.difference == pytest.approx(0.25)
    assert "nothing cheaper was found to be safe" in choice.lines()[1]


class Overflows(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        with torch.no_grad():
            self.down.weight.fill_(1e5)

    def forward(self, x):
        return self.norm(self.down(self.up(x).relu()))


def overflowing():
    return make_task(model=lambda: nn.Sequential(Overflows(), nn.Linear(8, 1)), rate=0.01)


def test_a_layer_that_overflows_becomes_an_exception_with_its_reason():
    choice = choose(overflowing, ["32-true", "16-mixed"], prefer="speed", run_slow=True)
    first = choice.find("16-mixed")
    assert first.judged == "failed" and "nan" in first.reason
    tried = [each for each in choice.candidates if each.reasons]
    reasons: Exceptions = {pattern: reason for each in tried for pattern, reason in each.reasons.items()}
    assert "float16 ends at 65,504" in reasons["0.down"] and reasons["0.down"].startswith("activations reach ")
    assert reasons["0"].startswith("0.down: activations reach ")
    assert any(each.precision == choice.precision and each.judged == "safe" for each in tried) or (
        choice.precision == "32-true"  # on a CPU that is slow in float16 none may save time
    )


def swallowing():
    return make_task(rate=1e-4)


def test_swallowed_updates_are_not_trusted_whatever_the_loss():
    choice = choose(swallowing, ["32-true", "bf16-true", "bf16-stochastic"])
    half = choice.find("bf16-true")
    assert half.judged == "swallows" and half.unchanged > 0.2 and "of the updates round to nothing" in half.reason
    assert choice.precision == "bf16-stochastic"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prefer": "money"}, "expected one of memory, speed"),
        ({"seeds": 2}, "fewer than 5 tell nothing apart"),
        ({"fit": "much"}, "no amount of memory"),
        ({"size": "2m"}, "expected one of 1m"),
    ],
)
def test_wrong_arguments_are_errors_before_anything_runs(options, words):
    with pytest.raises(ValueError, match=words):
        choose(make_task, None, **options)


# ---------------------------------------------------------------- from the command line


class Interrupted(io.StringIO):
    """A log at a line of which somebody presses Ctrl-C."""

    def write(self, text):
        if "seed 1001" in text:
            raise KeyboardInterrupt
        return super().write(text)


def test_interrupted_it_goes_on_where_it_was(tmp_path, monkeypatch):
    """As a file's task, in forks: no run that was done is done again, and nothing is left beside the file."""
    monkeypatch.setattr(chooser, "Child", lambda job, told: Fork(job, guarded(make_task), told))
    monkeypatch.setattr(contest, "RACERS_SEEDS", 1)
    out = tmp_path / "precision.json"
    with pytest.raises(KeyboardInterrupt):
        choose(None, ["32-true", "bf16-true"], Interrupted(), seeds=5, out=out)
    assert (tmp_path / "precision.json.runs").is_dir() and not out.exists()
    text = io.StringIO()
    choice = choose(None, ["32-true", "bf16-true"], text, seeds=5, out=out)
    log = text.getvalue()
    assert log.startswith("going on where it was interrupted") and "seed 1000" not in log.partition("32-true, seed")[0]
    assert "seed 0," not in log and "bf16-true, seed 1002" in log
    assert choice.precision and [each.name for each in tmp_path.iterdir()] == ["precision.json"]


BROKEN = """
def make():
    raise KeyError("mine")
"""


@pytest.mark.slow_start
def test_errors_in_the_users_file_show_its_traceback_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text(BROKEN)
    result = CliRunner().invoke(main, ["choose", "broken.py:make", "--accelerator", "cpu"])
    assert result.exit_code == 2, (result.output, result.exc_info)
    assert 'raise KeyError("mine")' in result.stderr
    assert "precision_lab" not in result.stderr and not list(tmp_path.glob("precision.json*"))
    for options, words in ((["gone.py:make"], "there is no file"), (["--fit", "much"], "no amount of memory")):
        result = CliRunner().invoke(main, ["choose", *options])
        assert result.exit_code == 2 and words in result.stderr


@pytest.mark.full
@pytest.mark.slow_start
def test_a_file_is_chosen_for_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    assert runner.invoke(main, ["new", "mine.py"]).exit_code == 0
    options = ["--accelerator", "cpu", "--modes", "32-true,bf16-mixed", "--steps", "20"]
    result = runner.invoke(main, ["choose", "mine.py:make", *options])
    assert result.exit_code == 0, result.output
    chosen = read_chosen()
    assert (
        chosen.made_by == "precision choose mine.py:make --steps 20"
        and f'precision="{chosen.precision}"' in result.stdout
    )
    record = runner.invoke(main, ["choose", "mine.py:make", *options, "--json"])
    assert json.loads(record.stdout)["precision"] == chosen.precision


def test_runs_are_done_once(fork):
    runs = Runs("", "1m", "cpu", fork, Console(file=io.StringIO()))
    first = runs.single("32-true", 2, [5, 6])
    again = runs.single("32-true", 2, [5, 6, 7])
    assert again[:2] == first and [row.seed for row in again] == [5, 6, 7]
    assert len({row.held_out_loss for row in again}) == 3
