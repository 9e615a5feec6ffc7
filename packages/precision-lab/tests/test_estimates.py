import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import precision_lab
from precision_lab import estimates
from precision_lab.cli import main
from precision_lab.estimates import Estimates, parse_bytes
from precision_lab.footprint import Footprint


def make():
    model = nn.Linear(1000, 1000, bias=False)
    return model, torch.optim.Adam(model.parameters()), [torch.ones(4, 1000)], lambda model, x: model(x).mean()


def test_a_function_is_estimated_in_each_mode_and_said_to_fit_or_not():
    found = precision_lab.estimate(make, ["32-true", "bf16-true"], fit="15MB")
    wide, narrow = found.rows
    assert (wide.params, narrow.params) == (4_000_000, 2_000_000)
    assert wide.optimizer["exp_avg"] == 4_000_000 and 16_000_000 < wide.peak < 25_000_000
    assert found.verdict()[0].startswith("32-true does not fit in 14.3 MiB: it needs ")
    assert found.verdict()[1] == "bf16-true fits in 14.3 MiB"
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

    with pytest.raises(precision_lab.TaskError, match="KeyError: 'mine'"):
        precision_lab.estimate(wrong, "32-true")


@pytest.mark.parametrize(
    ("text", "number"),
    [("24GB", 24 * 10**9), ("1.5 GiB", 3 * 2**29), ("512", 512), (100, 100), ("2m", 2 * 10**6)],
)
def test_amounts_of_memory(text, number):
    assert parse_bytes(text) == number


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--fit", "much"], "is no amount of memory"),
        (["--fit", "1.2.3GB"], "is no amount of memory"),
        (["--devices", "8"], "devices=8 needs a strategy that says how they share the work: ddp, fsdp"),
        (["--strategy", "ddp"], "'ddp' is for several devices"),
        (["--strategy", "pipeline", "--devices", "8"], "cannot be estimated"),
        (["--modes", "bf16-mixd"], "bf16-mixd"),
        (["--size", "2m"], "expected one of 1m"),
        (["--hf", "gone.json"], "there is no file 'gone.json'"),
        (["--hf", "gone.json", "--batch", "4"], "expected sequences x tokens"),
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
    assert "32-true does not fit in 1.95 KiB" in text and "no mode fits" in text and "16-true: no estimate: no" in text
    record = json.loads(CliRunner().invoke(main, ["estimate", "--json"]).output)
    assert record["modes"][0]["optimizer"] == {"exp_avg": 1600} and record["fit"] == 2000


CONFIG = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
CONFIG |= {"num_attention_heads": 4, "vocab_size": 1000}


@pytest.mark.full
@pytest.mark.slow_start
@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_a_config_of_hugging_face_is_a_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    command = [sys.executable, "-m", "precision_lab.cli", "estimate", "--modes", "32-true", "--json"]
    command += ["--hf", str(tmp_path), "--batch", "2x32"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (row,) = json.loads(finished.stdout)["modes"]
    attention, mlp, norms = 4 * 64 * 64, 3 * 64 * 128, 2 * 64
    assert row["params"] == 4 * (2 * 1000 * 64 + 2 * (attention + mlp + norms) + 64)
    assert row["optimizer"]["exp_avg"] == row["params"] and row["activations"] > 4 * 2 * 32 * 1000


TASK = """
import torch
from transformers import AutoModelForCausalLM

def load(**options):
    model = AutoModelForCausalLM.from_pretrained("saved", **options)
    ids = torch.zeros(2, 32, dtype=torch.int64)
    return model, torch.optim.AdamW(model.parameters()), [{"input_ids": ids, "labels": ids}]

def plain():
    return load()

def placed():
    return load(device_map="cpu", dtype=torch.bfloat16)
"""


@pytest.mark.full
@pytest.mark.slow_start
@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_a_model_from_pretrained_is_as_large_as_that_of_its_config(tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    make = "import transformers as t, json; c = t.LlamaConfig(**json.loads({0!r})); "
    make = make.format(json.dumps(CONFIG)) + 't.LlamaForCausalLM(c).save_pretrained("saved")'
    subprocess.run([sys.executable, "-c", make], check=True, capture_output=True, cwd=tmp_path, timeout=600)
    peaks = {}
    for what in (["task.py:plain"], ["task.py:placed"], ["--hf", "saved", "--batch", "2x32"]):
        command = [sys.executable, "-m", "precision_lab.cli", "estimate", "--modes", "32-true,bf16-true", "--json"]
        finished = subprocess.run([*command, *what], capture_output=True, text=True, cwd=tmp_path, timeout=600)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        for row in json.loads(finished.stdout)["modes"]:
            size = 4 if what == ["task.py:plain"] else 2
            assert not row["reason"] and row["loaded"] >= (what[0] != "--hf") * size * row["numbers"]
            peaks.setdefault(row["mode"], []).append(row["peak"])
    for several in peaks.values():
        assert max(several) == pytest.approx(min(several), rel=0.001)
