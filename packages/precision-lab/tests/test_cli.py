import json
import math
import subprocess
import sys
from statistics import median

import pytest
import torch
import torch._dynamo  # forks are made with it; imported here, its seconds are no test's
from click.testing import CliRunner

from precision_core import MODES, Policy, supports
from precision_core.hardware import FORMATS, cpu_has_float16
from precision_core.support import KNOWN, PLUGINS
from precision_lab import api
from precision_lab.cli import main
from precision_lab.commands.checks import checked_folder
from precision_lab.train import BATCH, Job

MODELS_BYTES = 1_272_640
OPTIONS = ("--steps", "--modes", "--seed", "--out", "--all", "--devices", "--strategy", "--accelerator")
OPTIONS += ("--seeds", "--sequential", "--fresh", "--size", "--against")
NAMED = ("64-true", "32-true", "bf16-mixed", "bf16-true", "bf16-master", "bf16-stochastic")
REFUSED = "params=float64,compute=float32"

pytestmark = pytest.mark.slow_start  # whichever test comes first trains in all of core's modes


def start_compare(*options):
    """Runs the command as users start it, with a child process a mode."""
    command = [sys.executable, "-W", "error", "-m", "precision_lab.cli", "compare", "--accelerator", "cpu", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def fork_compare(fork):
    """The same in this process, with a fork a mode, on a CPU that is fast in bfloat16 and slow in float16."""

    def fork_compare(*options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(api, "Child", fork)
            patch.setitem(FORMATS["cpu"], torch.bfloat16, lambda: ("native", "said so"))
            patch.setitem(FORMATS["cpu"], torch.float16, lambda: ("slow", "said so"))
            result = CliRunner().invoke(main, ["compare", "--accelerator", "cpu", *options])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return subprocess.CompletedProcess(options, result.exit_code, result.output, None)

    return fork_compare


FORKED = "forked"
STARTED = pytest.param("started", marks=[pytest.mark.full, pytest.mark.slow_start])


@pytest.fixture(scope="module", params=[FORKED, STARTED])
def compare(request):
    return request.getfixturevalue("fork_compare") if request.param == "forked" else start_compare


@pytest.fixture(scope="module")
def default_run(compare, tmp_path_factory):
    """Core's modes, four steps: what it printed, its record, its folder."""
    out = tmp_path_factory.mktemp("parent") / "new" / "folder"
    finished = compare("--steps", "6", "--seed", "3", "--seeds", "1", "--out", str(out))
    assert finished.returncode == 0, finished.stderr
    return finished, json.loads((out / "compare.json").read_text()), out


@pytest.fixture(scope="module")
def named_run(compare, request, tmp_path_factory):
    """The record of modes that run where they are named, on a CPU that is slow in bfloat16 too."""
    if compare is not start_compare:
        return request.getfixturevalue("default_run")[1]  # those that run by themselves on the CPU that is made up
    out = tmp_path_factory.mktemp("named")
    finished = compare("--steps", "6", "--seed", "3", "--seeds", "1", "--out", str(out), "--modes", ",".join(NAMED))
    assert finished.returncode == 0, finished.stderr
    return json.loads((out / "compare.json").read_text())


@pytest.fixture(scope="module")
def failing_run(compare, tmp_path_factory):
    """A mode that no plugin of core runs, then one that works, from the same seed as `default_run`."""
    out = tmp_path_factory.mktemp("failing")
    finished = compare(
        "--steps", "6", "--seed", "3", "--seeds", "1", "--out", str(out), "--modes", f"{REFUSED},32-true"
    )
    return finished, json.loads((out / "compare.json").read_text()), out


def rows(record):
    return {row["mode"]: row for row in record["modes"]}


def test_every_mode_has_a_row(default_run):
    finished, record, _ = default_run
    assert list(rows(record)) == list(MODES)
    table = finished.stdout.partition("held-out")[2]
    for mode, row in rows(record).items():
        assert Policy.parse(mode) == Policy(**{k: v for k, v in row["policy"].items() if k != "exceptions"})
        said = [line.split("  ")[0].strip() for line in table.splitlines()]  # modes with the same reason share a line
        assert sum(mode in each.split(", ") for each in said) == 1


def test_figures_follow_from_the_losses(named_run):
    done = {mode: row for mode, row in rows(named_run).items() if row["status"] == "done"}
    assert set(done) == set(NAMED)
    true = done["64-true"]["losses"]
    for row in done.values():
        assert len(row["losses"]) == len(row["step_seconds"]) == 6
        drift = max(abs(loss - t) / t for loss, t in zip(row["losses"], true, strict=True))
        assert row["drift"] == pytest.approx(drift, rel=1e-12)
        assert row["train_loss"] == row["losses"][-1]
        assert row["losses"][0] == pytest.approx(math.log(256), abs=0.3)
        assert row["held_out_loss"] < row["losses"][0] - 1
        assert row["step_ms"] == pytest.approx(1000 * sum(sorted(row["step_seconds"])[2:4]) / 2)
        # blocks of steps that all took in turn, after two that do not count; how long, the machine's speed says
        blocks = [slice(start, start + named_run["block"]) for start in range(2, 6, named_run["block"])]
        pairs = [[median(each["step_seconds"][steps]) for each in (row, done["32-true"])] for steps in blocks]
        assert row["time_ratio"] == pytest.approx(median(mine / base for mine, base in pairs))
        assert row["skipped_steps"] == 0 or row["policy"]["scale"]


def test_precisions_are_what_they_say(named_run, compare):
    """The same start for all; then each drifts as far as its dtypes make it, and takes the memory they take."""
    done = rows(named_run)
    assert done["64-true"]["drift"] == 0 < done["32-true"]["drift"] < 1e-5
    assert 1e-5 < done["bf16-mixed"]["drift"] < 0.01
    assert 1e-5 < done["bf16-true"]["drift"] < 0.02
    for mode, size in {"64-true": 8, "32-true": 4, "bf16-mixed": 4, "bf16-true": 2}.items():
        assert done[mode]["parameter_bytes"] == done[mode]["gradient_bytes"] == size * MODELS_BYTES
        assert done[mode]["optimizer_bytes"] == pytest.approx(2 * size * MODELS_BYTES, rel=0.001)
        if compare is start_compare:  # a fork may take what the process before it has left free
            assert done[mode]["peak_memory_bytes"] > 4 * size * MODELS_BYTES


def test_slow_modes_say_so(default_run, compare):
    finished, record, _ = default_run
    if compare is start_compare and cpu_has_float16():
        pytest.skip("this CPU has float16 units")
    why = "float16 has no units on this CPU, 9 to 26 times slower than float32"
    reason = f"{why if compare is start_compare else 'said so'}; --all runs it"
    for mode in ("16-mixed", "16-true", "16-master"):
        assert (rows(record)[mode]["status"], rows(record)[mode]["reason"]) == ("not run", reason)
        assert rows(record)[mode]["held_out_loss"] is None
    assert finished.stdout.count(f" 16-true, 16-mixed, 16-master  not run: {reason}") == 1


def test_a_log_gets_plain_lines(default_run):
    finished, _, out = default_run
    assert "\x1b" not in finished.stdout
    assert "\r" not in finished.stdout
    assert "step 6/6" in finished.stdout
    assert str(out / "compare.png") in finished.stdout
    assert not finished.stderr


def test_the_record_is_complete_and_knows_nothing_of_the_machines_paths(default_run):
    _, record, out = default_run
    assert (record["version"], record["steps"], record["seed"]) == (2, 6, 3)
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
    assert "float64 params" in failed["reason"]
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


def test_modes_of_packages_train_as_cores_do(compare, install, tmp_path):
    install("mine", ENTRIES, "my_half", HALF)
    modes = "bf16-true,my-half,my-late,my-gone"
    finished = compare("--steps", "2", "--seeds", "1", "--modes", modes, "--out", str(tmp_path / "out"))
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


@pytest.mark.full
@pytest.mark.slow_start
def test_the_command_as_users_start_it(install, tmp_path, forked):
    """One mode trains, as in a fork and bit for bit; the next one fails on the way. The output is not a terminal."""
    install("mine", ENTRIES, "my_half", HALF)
    out = tmp_path / "new" / "folder"
    finished = start_compare(
        "--steps", "6", "--seed", "3", "--seeds", "1", "--modes", "32-true,my-late", "--out", str(out)
    )
    assert (finished.returncode, finished.stderr) == (1, "")
    assert "\x1b" not in finished.stdout and "\r" not in finished.stdout
    assert "step 6/6" in finished.stdout and str(out / "compare.png") in finished.stdout
    table = finished.stdout.partition("held-out")[2]
    assert [line.split()[0] for line in table.splitlines() if line.split()[:1] in (["32-true"], ["my-late"])]
    picture = (out / "compare.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000

    record = json.loads((out / "compare.json").read_text())
    assert (record["version"], record["steps"], record["seed"]) == (2, 6, 3)
    assert str(tmp_path) not in json.dumps(record) and sys.prefix not in json.dumps(record)
    done, late = record["modes"]
    assert (late["status"], late["reason"], late["losses"]) == ("failed", "RuntimeError: only in training", [])
    assert f"failed: {late['reason']}" in finished.stdout
    assert (done["mode"], done["status"], len(done["step_seconds"])) == ("32-true", "done", 6)
    assert done["held_out_loss"] < done["losses"][0] - 1
    assert done["peak_memory_bytes"] > 4 * 4 * MODELS_BYTES
    events = list(forked(Job("32-true", 6, 3, "cpu"), BATCH))
    assert done["losses"] == [event["loss"] for event in events if "loss" in event]
    for name in ("policy", "parameter_bytes", "gradient_bytes", "optimizer_bytes", "skipped_steps"):
        assert [done[name]] == [event[name] for event in events if name in event]
    assert {"torch", "python", "device", "device_name", "threads"} <= record["environment"].keys()
    assert record["environment"].keys() == events[0].keys()


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
        (["--out", "s3://bucket/out"], "s3:// addresses are not supported"),
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
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "s3:").exists()


def test_home_and_file_addresses_are_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checked_folder("~/out") == checked_folder(f"file://{tmp_path}/out") == tmp_path / "out"
    assert (tmp_path / "out").is_dir()


def test_a_mode_that_is_not_installed_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(KNOWN[PLUGINS], "half", ("my-half",))
    result = CliRunner().invoke(main, ["compare", "--modes", "32-true,my-half", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    message = 'precision "my-half" needs precision-half: pip install ./packages/precision-half in a checkout'
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_help_lists_the_options():
    result = CliRunner().invoke(main, ["compare", "--help"])
    assert result.exit_code == 0
    assert all(option in result.output for option in OPTIONS)
