import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
from click.testing import CliRunner

from precision_lab.cli import main

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
@pytest.mark.parametrize(("kind", "words"), [("gpt9", "no model_type 'gpt9'"), ("vit", "no causal language")])
def test_a_config_of_another_model_is_refused_by_its_type(kind, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    command = [sys.executable, "-m", "precision_lab.cli", "estimate", "--hf", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 2 and words in finished.stderr and len(finished.stderr) < 500


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


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "is no JSON"), ("[1]", 'has no "model_type"'), ('{"hidden_size": 8}', 'has no "model_type"')],
)
def test_a_file_that_is_no_config_says_so(text, words, tmp_path):
    (tmp_path / "config.json").write_text(text)
    result = CliRunner().invoke(main, ["estimate", "--hf", str(tmp_path)])
    assert result.exit_code == 2 and words in " ".join(result.output.split())
