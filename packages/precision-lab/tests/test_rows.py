import json
import os

import pytest
import torch
from click.testing import CliRunner

from precision_core import MODES
from precision_core.hardware import FORMATS
from precision_core.testing import run_in_ranks
from precision_lab.cli import main
from precision_lab.modes import default_modes, parse_modes
from precision_lab.rows import ask_for_rows, make_rows, refusal_of

SLOW = "said so; --all runs it"


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch):
    """A CPU that is fast in bfloat16, whatever this one is."""
    monkeypatch.setitem(FORMATS["cpu"], torch.bfloat16, lambda: ("native", "said so"))


@pytest.fixture
def float16(monkeypatch):
    """Says how well this CPU computes in float16."""
    return lambda level: monkeypatch.setitem(FORMATS["cpu"], torch.float16, lambda: (level, "said so"))


def found(rows):
    return {row.mode: (row.status, row.reason) for row in rows}


@pytest.mark.parametrize("level", ["native", "emulated", "slow", "no"])
def test_of_all_modes_slow_ones_and_impossible_ones_are_left_out(level, float16):
    float16(level)
    reason = {"slow": SLOW, "no": "said so"}.get(level, "")
    rows = make_rows(default_modes(), "cpu", named=False, run_slow=False)
    assert found(rows) == {mode: ("not run", reason if mode.startswith("16") else "") for mode in MODES}
    assert all(row.policy["params"] == str(MODES[row.mode].params)[6:] for row in rows)


@pytest.mark.parametrize("mode", ["16-mixed", "16-true", "bf16-mixed; *.mlp: 16-true"])
def test_slow_modes_run_when_they_are_named_and_with_all(mode, float16):
    float16("slow")
    assert found(make_rows([mode], "cpu", named=False, run_slow=False)) == {mode: ("not run", SLOW)}
    assert found(make_rows([mode], "cpu", named=True, run_slow=False)) == {mode: ("not run", "")}
    assert found(make_rows([mode], "cpu", named=False, run_slow=True)) == {mode: ("not run", "")}


def test_a_mode_that_cannot_run_has_failed_when_it_was_named(float16):
    float16("no")
    assert found(make_rows(["16-true"], "cpu", named=False, run_slow=True)) == {"16-true": ("not run", "said so")}
    assert found(make_rows(["16-true"], "cpu", named=True, run_slow=True)) == {"16-true": ("failed", "said so")}
    (row,) = make_rows(parse_modes("params=float64,compute=float32"), "cpu", named=True, run_slow=False)
    assert row.status == "failed" and "float64" in row.reason


ROWS = """
from precision_core import SupportRow

def rows():
    yield SupportRow("mine", "cpu", "no", "not on Mondays")
    yield SupportRow("mine", "cuda", "slow", "by hand")
"""
ENTRIES = "[precision.plugins]\nmine = a:b\n[precision.support]\nmine = rows_module:rows\n"


def test_a_package_answers_for_its_modes(install):
    install("mine", ENTRIES, "rows_module", ROWS)
    (row,) = make_rows(["mine"], "cpu", named=True, run_slow=False)
    assert (row.mode, row.status, row.reason, row.policy) == ("mine", "failed", "not on Mondays", None)


def test_a_package_that_is_broken_is_no_reason_not_to_train(install, float16):
    float16("slow")
    install("broken", "[precision.plugins]\nmine = a:b\n[precision.support]\nbroken = gone_module:rows\n")
    rows = make_rows(["mine", "32-true", "16-mixed"], "cpu", named=False, run_slow=False)
    assert found(rows) == {"mine": ("not run", ""), "32-true": ("not run", ""), "16-mixed": ("not run", SLOW)}


STRATEGY = """
from precision_core import SingleDeviceStrategy

class Picky(SingleDeviceStrategy):
    name = "picky"

    def refuses(self, precision):
        return "no halves here" if "bf16" in precision.mode else None
"""


def test_what_a_strategy_refuses_is_a_row_with_its_reason(install):
    install("mine", "[precision.strategies]\npicky = picky_module:Picky\n", "picky_module", STRATEGY)
    modes = ["32-true", "bf16-mixed"]
    rows = make_rows(modes, "cpu", named=False, run_slow=False, strategy="picky")
    assert found(rows) == {"32-true": ("not run", ""), "bf16-mixed": ("not run", "no halves here")}
    rows = make_rows(modes, "cpu", named=True, run_slow=False, strategy="picky")
    assert found(rows)["bf16-mixed"] == ("failed", "no halves here")


@pytest.mark.parametrize(
    ("strategy", "devices", "words"),
    [("nonsense", 1, "nonsense"), ("single_device", 2, "runs in one process"), ("xla", 1, "precision-xla")],
)
def test_a_strategy_that_cannot_run_here_is_a_wrong_option(strategy, devices, words):
    with pytest.raises(ValueError, match=words):
        refusal_of("32-true", "cpu", strategy, devices)


# ---------------------------------------------------------------- a GPU, asked by a child


def compare_beside_a_gpu(out, *options):
    """Runs `compare` in a process where torch finds a GPU, and returns what was asked of it that makes a context."""
    asked = []

    def initialise():
        asked.append("torch.cuda._lazy_init")
        raise RuntimeError("a context was made")

    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # to the child there is none, wherever this runs
    torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
    torch.cuda._lazy_init = torch.cuda.init = initialise
    assert not torch.cuda.is_initialized()
    result = CliRunner().invoke(main, ["compare", "--accelerator", "cuda", "--out", str(out), *options])
    return asked, torch.cuda.is_initialized(), result.exit_code, result.output


@pytest.mark.slow_start
def test_the_parent_makes_no_cuda_context(tmp_path):
    """Asked for a GPU that torch seems to find, it leaves all questions to the child, which finds none."""
    modes = "64-true,bf16-mixed,16-mixed"
    ((asked, initialised, code, output),) = run_in_ranks(1, lambda: compare_beside_a_gpu(tmp_path, "--modes", modes))
    assert (asked, initialised, code) == ([], False, 1), output
    record = json.loads((tmp_path / "compare.json").read_text())
    reasons = {row["mode"]: (row["status"], row["reason"]) for row in record["modes"]}
    assert reasons == dict.fromkeys(modes.split(","), ("failed", "torch finds no cuda device here"))


@pytest.mark.full
@pytest.mark.slow_start
def test_what_the_child_refuses_the_parent_refuses(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    options = {"named": False, "run_slow": False, "strategy": "single_device", "devices": 2}
    with pytest.raises(ValueError, match="torch finds no cuda device here"):
        ask_for_rows(["32-true"], "cuda", **options)


def test_a_cpu_is_asked_in_this_process():
    options = {"named": False, "run_slow": False, "strategy": "auto", "devices": 1}
    assert ask_for_rows(["32-true"], "cpu", **options) == make_rows(["32-true"], "cpu", **options)
