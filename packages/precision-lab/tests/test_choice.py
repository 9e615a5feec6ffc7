import json

import pytest
from rich.console import Console

from precision_core.support import read_chosen
from precision_lab.choice import Candidate, Choice
from precision_lab.contest import Contest
from precision_lab.evidence import weigh
from precision_lab.runs import Runs
from precision_lab.table import print_texts

PAIRS = {seed: float(seed) for seed in range(5)}
SAFE = weigh({seed: loss + 0.1 for seed, loss in PAIRS.items()}, PAIRS)
CHOSEN = "16-mixed; blocks.3.mlp.down: 32-true"
REASON = "activations reach 81,000, float16 ends at 65,504"


def choice(precision=CHOSEN, **options):
    candidates = [
        Candidate("16-mixed", 600, 0.7, "failed", "FloatingPointError: the training loss is nan at step 1 (race)"),
        Candidate(CHOSEN, 700, 0.8, "safe", evidence=SAFE, reasons={"blocks.3.mlp.down": REASON}),
        Candidate("32-true", 1000, 1.0, "reference"),
    ]
    machine = {"device": "cpu", "formats": {}}
    return Choice(precision, candidates, 300, 75, model="m", machine=machine, untested=["16-true: slow"], **options)


def test_it_says_what_to_pass_why_and_what_it_costs_and_saves():
    lines = choice().lines()
    assert lines[:2] == [f'precision="{CHOSEN}"', f"blocks.3.mlp.down: 32-true: {REASON}"]
    assert lines[2] == (
        "costs +0.1 held-out loss (up to +0.1), where 32-true itself has a standard deviation of 1.6 over seeds "
        "(5 seeds, 300 steps); saves 30% of the estimated peak bytes (700 B of 0.977 KiB); 0.80 x the time of a step"
    )
    assert lines[3:] == [
        "16-mixed: failed: FloatingPointError: the training loss is nan at step 1 (race)",
        "not tested: 16-true: slow",
    ]


def test_no_figure_is_cut_where_the_terminal_is_narrow(capsys):
    print_texts(*choice().table(), Console(width=40, highlight=False))
    out = capsys.readouterr().out
    assert f"{CHOSEN} " in out and "700 B" in out and "+0.06" in out


def test_32_true_and_no_answer_are_said_as_such():
    assert choice("32-true").lines()[1] == "nothing cheaper was found to be safe"
    assert choice("").lines()[0] == "No answer" and choice("").reasons == {}


def test_the_file_has_the_reasons_and_every_figure(tmp_path):
    path = tmp_path / "precision.json"
    found = choice(command="precision choose mine.py")
    found.write(path)
    chosen = read_chosen(f"auto:{path}")
    assert (chosen.precision, chosen.reasons) == (CHOSEN, {"blocks.3.mlp.down": REASON})
    assert (chosen.model, chosen.machine["device"], chosen.made_by) == ("m", "cpu", "precision choose mine.py")
    measured = json.loads(path.read_text())["measured"]
    assert measured["candidates"][1]["evidence"]["difference"] == pytest.approx(0.1)
    assert found.path == str(path) and f"written to {path}" in repr(found)


@pytest.mark.parametrize(
    ("prefer", "order"),
    [
        ("memory", ["1", "2", "3"]),  # 500 x 1, 540 x 1, 500 x 3 ** 0.1 = 558
        ("speed", ["2", "1", "3"]),
    ],
)
def test_time_counts_a_little_and_speed_alone_if_that_is_preferred(prefer, order):
    found = choice()
    found.prefer = prefer
    contest = Contest(found, Runs("", "1m", "cpu", None, Console()), 0, 16)
    contest._base_bytes = 1000.0
    candidates = [Candidate("3", 500, 9.0), Candidate("2", 540, 0.99), Candidate("1", 500, 1.0)]
    assert [each.precision for each in sorted(candidates, key=contest._cost)] == order
