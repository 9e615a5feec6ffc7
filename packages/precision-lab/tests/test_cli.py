import json
import math
import subprocess
import sys

import pytest
from click.testing import CliRunner

from precision_core import MODES, Policy, supports
from precision_core.discovery import KNOWN, PLUGINS
from precision_core.formats import cpu_has_float16
from precision_lab.cli import main

MODELS_BYTES = 1_272_640
OPTIONS = ("--steps", "--modes", "--seed", "--out", "--all", "--devices", "--strategy", "--accelerator")
NAMED = ("64-true", "32-true", "bf16-mixed", "bf16-true")
REFUSED = "params=float32,compute=float32,master=float64"


def run_compare(*options):
    command = [sys.executable, "-W", "error", "-m", "precision_lab.cli", "compare", "--accelerator", "cpu", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """Core's modes, four steps: what it printed, its record, its folder."""
    out = tmp_path_factory.mktemp("parent") / "new" / "folder"
    finished = run_compare("--steps", "4", "--seed", "3", "--out", str(out))
    assert finished.returncode == 0, finished.stderr
    return finished, json.loads((out / "compare.json").read_text()), out


@pytest.fixture(scope="module")
def named_run(tmp_path_factory):
    """The record of modes that run where they are named, on a CPU that is slow in bfloat16 too."""
    out = tmp_path_factory.mktemp("named")
    finished = run_compare("--steps", "4", "--seed", "3", "--out", str(out), "--modes", ",".join(NAMED))
    assert finished.returncode == 0, finished.stderr
    return json.loads((out / "compare.json").read_text())


@pytest.fixture(scope="module")
def failing_run(tmp_path_factory):
    """A mode that no plugin of core runs, then one that works, from the same seed as `default_run`."""
    out = tmp_path_factory.mktemp("failing")
    finished = run_compare("--steps", "4", "--seed", "3", "--out", str(out), "--modes", f"{REFUSED},32-true")
    return finished, json.loads((out / "compare.json").read_text()), out


def rows(record):
    return {row["mode"]: row for row in record["modes"]}


def test_every_mode_has_a_row(default_run):
    finished, record, _ = default_run
    assert list(rows(record)) == list(MODES)
    table = finished.stdout.partition("held-out")[2]
    for mode, row in rows(record).items():
        assert Policy.parse(mode) == Policy(**{k: v for k, v in row["policy"].items() if k != "exceptions"})
        assert sum(line.strip().startswith(mode + " ") for line in table.splitlines()) == 1


def test_figures_follow_from_the_losses(named_run):
    done = {mode: row for mode, row in rows(named_run).items() if row["status"] == "done"}
    assert tuple(done) == NAMED
    true = done["64-true"]["losses"]
    for row in done.values():
        assert len(row["losses"]) == len(row["step_seconds"]) == 4
        drift = max(abs(loss - t) / t for loss, t in zip(row["losses"], true, strict=True))
        assert row["drift"] == pytest.approx(drift, rel=1e-12)
        assert row["train_loss"] == row["losses"][-1]
        assert row["losses"][0] == pytest.approx(math.log(256), abs=0.3)
        assert row["held_out_loss"] < row["losses"][0] - 1
        assert row["step_ms"] == pytest.approx(1000 * sum(sorted(row["step_seconds"])[1:3]) / 2)
        assert row["time_ratio"] == pytest.approx(row["step_ms"] / done["32-true"]["step_ms"])
        assert row["skipped_steps"] == 0 or row["policy"]["scale"]


def test_precisions_are_what_they_say(named_run):
    """The same start for all; then each drifts as far as its dtypes make it, and takes the memory they take."""
    done = rows(named_run)
    assert done["64-true"]["drift"] == 0 < done["32-true"]["drift"] < 1e-5
    assert 1e-5 < done["bf16-mixed"]["drift"] < 0.01
    assert 1e-5 < done["bf16-true"]["drift"] < 0.02
    for mode, size in {"64-true": 8, "32-true": 4, "bf16-mixed": 4, "bf16-true": 2}.items():
        assert done[mode]["parameter_bytes"] == done[mode]["gradient_bytes"] == size * MODELS_BYTES
        assert done[mode]["optimizer_bytes"] == pytest.approx(2 * size * MODELS_BYTES, rel=0.001)
        assert done[mode]["peak_memory_bytes"] > 4 * size * MODELS_BYTES


def test_slow_modes_say_so(default_run):
    finished, record, _ = default_run
    if cpu_has_float16():
        pytest.skip("this CPU has float16 units")
    reason = "float16 has no units on this CPU, 9 to 26 times slower than float32; --all runs it"
    for mode in ("16-mixed", "16-true"):
        assert (rows(record)[mode]["status"], rows(record)[mode]["reason"]) == ("not run", reason)
        assert rows(record)[mode]["held_out_loss"] is None
    assert finished.stdout.count(f"not run: {reason}") == 2


def test_a_log_gets_plain_lines(default_run):
    finished, _, out = default_run
    assert "\x1b" not in finished.stdout
    assert "\r" not in finished.stdout
    assert "step 4/4" in finished.stdout
    assert str(out / "compare.png") in finished.stdout
    assert finished.stderr == ""


def test_the_record_is_complete_and_knows_nothing_of_the_machines_paths(default_run):
    _, record, out = default_run
    assert (record["version"], record["steps"], record["seed"]) == (1, 4, 3)
    assert {"torch", "python", "device", "device_name", "threads"} <= record["environment"].keys()
    assert record["settings"]["model"] == {"width": 160, "layers": 4, "heads": 4, "context": 128}
    assert str(out.parent.parent) not in json.dumps(record)
    assert sys.prefix not in json.dumps(record)


def test_a_picture_is_drawn(default_run):
    picture = (default_run[2] / "compare.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_a_failing_mode_is_a_row_and_the_others_go_on(failing_run):
    finished, record, out = failing_run
    failed, done = record["modes"]
    assert finished.returncode == 1
    assert failed["status"] == "failed"
    assert failed["reason"] == supports(REFUSED, "cpu").reason
    assert "master" in failed["reason"]
    assert f"failed: {failed['reason']}" in finished.stdout
    assert done["status"] == "done"
    assert done["drift"] is None  # no 64-true among the modes
    assert (out / "compare.png").exists()


def test_same_seed_same_losses_bit_for_bit(default_run, failing_run):
    first, second = rows(default_run[1])["32-true"], rows(failing_run[1])["32-true"]
    assert first["losses"] == second["losses"]
    assert first["held_out_loss"] == second["held_out_loss"]


HALF = """
from precision_core import HalfPrecision, SupportRow

class MyHalf(HalfPrecision):
    def __init__(self, mode):
        super().__init__("params=bfloat16,buffers=float32")
        self.asked_for = mode

    @property
    def mode(self):
        return self.asked_for

class Late(MyHalf):
    def forward_context(self):
        raise RuntimeError("only in training")

def rows():
    yield SupportRow("my-half", "cpu", "slow", "by hand")
"""
ENTRIES = """
[precision.plugins]
my-half = my_half:MyHalf
my-late = my_half:Late
my-gone = gone_module:Half
[precision.support]
mine = my_half:rows
"""


def test_modes_of_packages_train_as_cores_do(install, tmp_path):
    install("mine", ENTRIES, "my_half", HALF)
    modes = "bf16-true,my-half,my-late,my-gone"
    finished = run_compare("--steps", "2", "--modes", modes, "--out", str(tmp_path / "out"))
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    of = rows(record)
    assert list(of) == modes.split(",") and finished.returncode == 1
    mine, same = of["my-half"], of["bf16-true"]
    assert mine["status"] == "done" and len(mine["losses"]) == 2  # it was named, so slow or not it runs
    for figure in ("losses", "held_out_loss", "parameter_bytes", "gradient_bytes", "optimizer_bytes"):
        assert mine[figure] == same[figure] is not None
    assert mine["policy"] == same["policy"] | {"buffers": "float32"}
    assert (of["my-late"]["status"], of["my-late"]["reason"]) == ("failed", "RuntimeError: only in training")
    assert of["my-gone"]["status"] == "failed" and of["my-gone"]["policy"] is None
    assert 'precision "my-gone" is gone_module:Half of mine, which cannot be imported' in of["my-gone"]["reason"]
    table = finished.stdout.partition("held-out")[2]
    assert sum(line.split()[:1] == ["my-half"] for line in table.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--modes", "32-true,bf16-mixd"], "bf16-mixd"),
        (["--modes", "bf16,bf16-mixed"], "given twice"),
        (["--modes", "32-true,my-unknown"], "installed packages bring"),
        (["--modes", ""], "no mode"),
        (["--steps", "0"], "--steps"),
        (["--seed", "-1"], "--seed"),
        (["--accelerator", "abacus"], "abacus"),
        (["--strategy", "abacus"], "abacus"),
        (["--out", "file"], "file"),
        (["--out", "file/inside"], "cannot write in 'file/inside'"),
    ],
)
def test_bad_options_are_clear_and_early(options, message, tmp_path, monkeypatch, install):
    install("mine", ENTRIES)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    result = CliRunner().invoke(main, ["compare", *options])
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert (tmp_path / "file").read_text() == "mine"


def test_a_mode_that_is_not_installed_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(KNOWN[PLUGINS], "half", ("my-half",))
    result = CliRunner().invoke(main, ["compare", "--modes", "32-true,my-half", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    message = 'precision "my-half" needs precision-half: pip install "precision-core[half]"'
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_help_lists_the_options():
    result = CliRunner().invoke(main, ["compare", "--help"])
    assert result.exit_code == 0
    assert all(option in result.output for option in OPTIONS)
