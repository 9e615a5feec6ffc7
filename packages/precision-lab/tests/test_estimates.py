import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import precision_lab
from precision_core import MODES
from precision_lab import estimates
from precision_lab.cli import main
from precision_lab.estimates import Estimates, parse_bytes
from precision_lab.footprint import Footprint

MODES = tuple(MODES)
SOME = "none of these modes fits; leave modes out to see all of core's"
ONE_MODE = "no other mode was tried; leave modes out to see all of core's"


def make():
    model = nn.Linear(1000, 1000, bias=False)
    return model, torch.optim.Adam(model.parameters()), [torch.ones(4, 1000)], lambda model, x: model(x).mean()


def test_a_function_is_estimated_in_each_mode_and_said_to_fit_or_not():
    found = precision_lab.estimate(make, ["32-true", "bf16-true"], fit="15MB")
    wide, narrow = found.rows
    assert (wide.params, narrow.params) == (4_000_000, 2_000_000)
    assert wide.optimizer["exp_avg"] == 4_000_000 and 16_000_000 < wide.peak < 25_000_000
    assert found.verdict() == [
        "32-true does not fit in 15 MB (14.3 MiB): it needs 22.9 MiB",
        "bf16-true fits in 15 MB (14.3 MiB)",
    ]
    assert json.loads(json.dumps(found.as_dict()))["modes"][1]["params"] == 2_000_000
    assert [mode["accelerate"] for mode in found.as_dict()["modes"]] == [16_000_000, 8_000_000]
    assert "accelerate estimate-memory, without activations, says 15.3 MiB for 32-true; 7.63 MiB for" in repr(found)
    assert "bf16-true" in repr(found) and "<td>bf16-true</td>" in found._repr_html_()


def test_a_mode_that_cannot_be_traced_is_a_row_with_the_reason_and_users_errors_are_theirs():
    found = precision_lab.estimate(make, "32-true,params=float64,compute=float32")
    assert found.rows[0].peak > 0 and "nothing runs float64 params" in found.rows[1].reason
    assert "no estimate: ValueError" in repr(found)

    def wrong():
        raise KeyError("mine")

    with pytest.raises(precision_lab.TaskError, match="KeyError: 'mine'") as raised:
        precision_lab.estimate(wrong, "32-true")
    assert str(raised.value).count("Traceback") == 1


@pytest.mark.parametrize(
    ("peaks", "fit", "asked", "says"),
    [
        ({"32-true": 9, "bf16-true": 5}, 10, "", ["bf16-true and 32-true fit in 10 B"]),
        ({"c": 3, "a": 1, "b": 2}, 3, "3 B", ["a, b and c fit in 3 B"]),
        ({"a": 8, "b": 4}, 5, "", ["a does not fit in 5 B: it needs 8 B", "b fits in 5 B"]),
        ({"a": 2**20 + 1}, 2**20, "", ["a does not fit in 1 MiB: it needs 1 MiB, which is 1 bytes more", ONE_MODE]),
        ({"a": 8, "b": 9}, 5, "", ["a does not fit in 5 B: it needs 8 B", "b does not fit in 5 B: it needs 9 B", SOME]),
        (dict.fromkeys(MODES, 9), 10, "", [f"{', '.join(MODES[:-1])} and {MODES[-1]} fit in 10 B"]),
        ({}, 10, "", []),
    ],
)
def test_sentences_say_what_fits(peaks, fit, asked, says):
    rows = [Footprint(mode, peak=peak) for mode, peak in peaks.items()]
    failed = Footprint("16-true", reason="why")
    assert Estimates([*rows, failed], fit, asked).verdict() == says


def test_sentences_of_several_devices_are_about_each():
    rows = [Footprint("32-true", peak=9, strategy="fsdp", devices=8), Footprint("bf16-true", peak=5, devices=8)]
    assert Estimates(rows, 6).verdict()[1] == "bf16-true fits in 6 B on each of 8 devices"
    assert Estimates(rows, None).verdict() == []


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("24GB", 24 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("2000000", 2 * 10**6),
        ("512B", 512),
        (100, 100),
        ("2m", 2 * 10**6),
    ],
)
def test_amounts_of_memory(text, number):
    assert parse_bytes(text) == number


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--fit", "much"], "is no amount of memory"),
        (["--fit", "24"], "'24' would be 24 bytes: say 24GB, 24GiB"),
        (["--fit", "1.2.3GB"], "is no amount of memory"),
        (["--devices", "8"], "devices=8 needs a strategy that says how they share the work: ddp, fsdp"),
        (["--strategy", "ddp"], "'ddp' is for several devices"),
        (["--strategy", "pipeline", "--devices", "8"], "cannot be estimated"),
        (["--modes", "bf16-mixd"], "bf16-mixd"),
        (["--size", "2m"], "expected one of 1m"),
        (["--hf", "gone.json"], "there is no file 'gone.json'"),
        (["--hf", "gone.json", "--batch", "4"], "expected sequences x tokens"),
        (["--hf", "gone.json", "--batch", "4x"], "expected sequences x tokens"),
        (["--hf", "gone.json", "--batch", "0x4"], "expected sequences x tokens"),
        (["--hf", "gone.json", "task.py:make"], "are two models"),
        (["--devices", "0"], "0 is not in the range"),
        (["gone.py:make"], "there is no file 'gone.py'"),
    ],
)
def test_wrong_options_are_errors(options, words):
    result = CliRunner().invoke(main, ["estimate", *options])
    assert result.exit_code == 2 and words in " ".join(result.output.split()), result.output


def test_the_command_prints_a_table_or_json(monkeypatch):
    rows = [Footprint("32-true", 800, 80, 8, {"exp_avg": 1600}, 5, 70, 30, 2593), Footprint("16-true", reason="no")]
    monkeypatch.setattr(estimates, "estimate", lambda task, modes, **options: Estimates(rows, 2000))
    text = CliRunner().invoke(main, ["estimate"]).output
    assert (
        "32-true does not fit in 1.95 KiB" in text
        and "no other mode was tried" in text
        and "16-true: no estimate: no" in text
    )
    record = json.loads(CliRunner().invoke(main, ["estimate", "--json"]).output)
    assert record["modes"][0]["optimizer"] == {"exp_avg": 1600} and record["fit"] == 2000
