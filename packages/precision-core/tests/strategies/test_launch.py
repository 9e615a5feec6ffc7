"""Launching for real: scripts, modules, functions, torchrun, and what a failing rank leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from precision_core import Fabric

LIMIT = 600  # seconds; importing torch alone takes twenty on a machine where forty others run
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

TALK = """
import os, sys, time
import torch
from precision_core import Fabric

fabric = Fabric(accelerator="cpu", devices=2)
fabric.launch()
ranks = fabric.all_gather(torch.tensor(fabric.global_rank)).tolist()
fabric.print("args", sys.argv[1:], "ranks", ranks, flush=True)
if "--fail" in sys.argv and fabric.global_rank == 1:
    raise ValueError("rank one has had enough")
if "--fail" in sys.argv:
    fabric.barrier()
if "--wait" in sys.argv:
    os.write(1, b"up\\n")  # at once: two prints of unbuffered processes may mix
    time.sleep(1000)
"""

TRAIN = """
import sys
import torch
from torch import nn
from precision_core import Fabric

def main():
    fabric = Fabric(accelerator="cpu", devices=2, precision="bf16-mixed")
    fabric.launch()
    torch.manual_seed(fabric.global_rank)
    model = nn.Linear(2, 1)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(3):
        optimizer.zero_grad()
        fabric.backward(model(torch.randn(4, 2)).pow(2).mean())
        optimizer.step()
        if "--fail" in sys.argv and step == 1 and fabric.global_rank == 1:
            raise ValueError("rank one has had enough")
    weights = fabric.all_gather(model.weight.detach())
    assert torch.equal(weights[0], weights[1])
    fabric.print("args", sys.argv[1:], "ranks", [0, 1])

if __name__ == "__main__":
    main()
"""


def environment() -> dict[str, str]:
    alone = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    return {**alone, "OMP_NUM_THREADS": "1"}


def run(*command: str, folder: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        input=stdin,
    )


def processes_of(folder: Path) -> list[str]:
    listing = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listing.splitlines() if str(folder) in line]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "talk.py").write_text(TALK)
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "__main__.py").write_text(TRAIN)
    return tmp_path


# ---------------------------------------------------------------- scripts


@pytest.mark.slow_start
@pytest.mark.parametrize("script", ["talk.py", pytest.param("train.py", marks=pytest.mark.full)])
def test_a_script_starts_again_in_each_process_and_a_failing_rank_ends_the_job(script: str, folder: Path) -> None:
    """The other rank is in a collective then, and fails too: the traceback of the one that failed first comes first."""
    done = run(script, "--lr", "0.1", "--fail", folder=folder)
    assert done.returncode != 0
    assert done.stdout == ("args ['--lr', '0.1', '--fail'] ranks [0, 1]\n" if script == "talk.py" else "")
    tracebacks = [line for line in done.stderr.splitlines() if "Traceback" in line]
    assert tracebacks[0].startswith("[rank1]")
    assert "ValueError: rank one has had enough" in done.stderr
    assert not processes_of(folder)


@pytest.mark.slow_start
@pytest.mark.full
@pytest.mark.parametrize("start", [["train.py"], ["-m", "package"]], ids=" ".join)
def test_a_script_or_module_trains_in_each_process(start: list[str], folder: Path) -> None:
    done = run(*start, "--lr", "0.1", folder=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "args ['--lr', '0.1'] ranks [0, 1]\n"


HANGS = """
import time
from precision_core import Fabric

fabric = Fabric(accelerator="cpu", devices=2)
fabric.launch()
if fabric.global_rank == 1:
    raise RuntimeError("gone")
time.sleep(1000)
"""


@pytest.mark.slow_start
@pytest.mark.full
def test_a_rank_that_waits_elsewhere_is_ended_too(folder: Path) -> None:
    (folder / "hangs.py").write_text(HANGS)
    done = run("hangs.py", folder=folder)
    assert done.returncode != 0 and "[rank1]: RuntimeError: gone" in done.stderr
    assert not processes_of(folder)


@pytest.mark.slow_start
def test_an_interrupt_ends_all_processes(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(folder / "talk.py"), "--wait"],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    said = sorted(process.stdout.readline() for _ in range(3))
    assert said == ["args ['--wait'] ranks [0, 1]\n", "up\n", "up\n"]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    assert not processes_of(folder)


# ---------------------------------------------------------------- torchrun


IN_TURN = """
import sys
import torch
from precision_core import Fabric

for number in range(20):
    fabric = Fabric(accelerator="cpu", devices=2)
    fabric.launch()
    ranks = fabric.all_gather(torch.tensor(fabric.global_rank)).tolist()
    if "train" in sys.argv:
        model = fabric.setup(torch.nn.Linear(2, 1))
        fabric.backward(model(torch.randn(4, 2)).sum())
    fabric.print(number, *sys.argv[1:], *ranks, flush=True)
    fabric.teardown()
"""


@pytest.mark.slow_start
@pytest.mark.parametrize("argument", ["talk", pytest.param("train", marks=pytest.mark.full)])
def test_under_torchrun_it_joins_and_one_fabric_follows_another(argument: str, folder: Path) -> None:
    """Else the third finds on torchrun's store what is left of the second, and waits for ever."""
    (folder / "turns.py").write_text(IN_TURN)
    done = run(*TORCHRUN, "--nproc-per-node=2", "turns.py", argument, folder=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{number} {argument} 0 1" for number in range(20)]


REFUSED = "Fabric(devices=2, num_nodes=1) does not fit how this process was launched: 3 processes"


def test_another_number_of_processes_is_refused_naming_both(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(VARIABLES, ("0", "0", "3", "3", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as error:
        Fabric(accelerator="cpu", devices=2)
    assert REFUSED in str(error.value)


@pytest.mark.slow_start
@pytest.mark.full
def test_torchrun_with_another_number_is_refused_naming_both(folder: Path) -> None:
    done = run(*TORCHRUN, "--nproc-per-node=3", "train.py", folder=folder)
    assert done.returncode != 0
    assert REFUSED in done.stderr


# ---------------------------------------------------------------- functions, and what a strategy needs of its process


FUNCTION = """
import sys
import torch
from precision_core import Fabric

def train(fabric, factor, fail=False):
    if fail and fabric.global_rank == 1:
        raise ValueError("rank one fails")
    return fabric.all_reduce(torch.tensor([1.0 + fabric.global_rank]), "sum").item() * factor

if __name__ == "__main__":
    fabric = Fabric(accelerator="cpu", devices=2)
    print("got", fabric.launch(train, 10, fail=False))
    try:
        fabric.launch(train, 1, fail=True)
    except RuntimeError as error:
        assert "rank 1 of 2 failed first" in str(error) and "ValueError: rank one fails" in str(error), error
        print("failed as it should")
"""


@pytest.mark.slow_start
@pytest.mark.full
def test_a_function_runs_in_new_processes_and_returns_rank_zeros_value(folder: Path) -> None:
    (folder / "function.py").write_text(FUNCTION)
    done = run("function.py", folder=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "got 30.0\nfailed as it should\n"


WITH_VARIABLES = """
import os, sys
from dataclasses import replace
from precision_core import Fabric, SingleDeviceStrategy

class Picky(SingleDeviceStrategy):
    def lay_out(self, *asked):
        missing = {} if os.environ.get("BEADS") == "7" else {"BEADS": "7"}
        return replace(super().lay_out(*asked), missing=missing)

def train(fabric, add):
    return int(os.environ["BEADS"]) + add, fabric.world_size

if __name__ == "__main__":
    fabric = Fabric(strategy=Picky())
    if sys.argv[1] == "function":
        print(fabric.launch(train, add=1), "BEADS" in os.environ)
        fabric.setup_dataloaders([1])
    fabric.launch()
    print(train(fabric, 2), sys.argv[1:])
"""


@pytest.mark.slow_start
def test_a_function_runs_in_a_process_with_the_variables_that_a_strategy_needs(folder: Path) -> None:
    (folder / "picky.py").write_text(WITH_VARIABLES)
    done = run("picky.py", "function", folder=folder)
    assert done.stdout == "(8, 1) False\n", done.stderr
    assert "this run needs a process that was started with BEADS=7: call fabric.launch() right after" in done.stderr


@pytest.mark.slow_start
def test_a_script_starts_again_with_the_variables_that_a_strategy_needs(folder: Path) -> None:
    (folder / "picky.py").write_text(WITH_VARIABLES)
    done = run("picky.py", "script", folder=folder)
    assert done.returncode == 0 and done.stdout == "(9, 1) ['script']\n", done.stderr


# ---------------------------------------------------------------- without a script


TYPED_IN = """
import json, sys, time
from dataclasses import replace
import torch
from precision_core import Fabric, SingleDeviceStrategy

class Picky(SingleDeviceStrategy):
    def lay_out(self, *asked):
        return replace(super().lay_out(*asked), missing={"BEADS": "7"})

def train(fabric, factor):
    return fabric.all_reduce(torch.tensor([1.0 + fabric.global_rank]), "sum").item() * factor

def hang_or_fail(fabric):
    if fabric.global_rank == 0:
        time.sleep(1000)
    raise ValueError("rank one fails")

def refusal(function, *args):
    try:
        function(*args)
    except RuntimeError as error:
        return str(error)

def fabric():
    return Fabric(accelerator="cpu", devices=2)

not_started, one = fabric(), torch.ones(1)
said = {
    "function": fabric().launch(train, factor=10),
    "failure": refusal(fabric().launch, hang_or_fail),
    "script": refusal(fabric().launch),
    "variables": refusal(Fabric(strategy=Picky()).launch),
    "world": (not_started.world_size, not_started.global_rank, not_started.is_global_zero),
    "setup": refusal(not_started.setup, torch.nn.Linear(1, 1)),
    "barrier": refusal(not_started.barrier),
    "all_reduce": refusal(not_started.all_reduce, one),
}
print(json.dumps(said))
"""


def said_by(*command: str, folder: Path, stdin: str = "") -> dict[str, Any]:
    done = run(*command, folder=folder, stdin=stdin)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.slow_start
@pytest.mark.parametrize(
    ("start", "stdin"),
    [(["-c", TYPED_IN], ""), pytest.param(["-"], TYPED_IN, marks=pytest.mark.full)],
    ids=["-c", "stdin"],
)
def test_what_was_typed_in_launches_functions_and_is_told_what_else_to_do(
    start: list[str], stdin: str, folder: Path
) -> None:
    said = said_by(*start, folder=folder, stdin=stdin)
    assert said["function"] == 30.0
    assert "rank 1 of 2 failed first" in said["failure"] and "ValueError: rank one fails" in said["failure"]
    assert said["script"].startswith("fabric.launch() has no script to start 2 times")
    assert "pass a function (fabric.launch(train))" in said["script"]
    assert "no script to start again" in said["variables"] and "start with BEADS=7" in said["variables"]
    assert said["world"] == [2, 0, True]
    not_started = (
        "this run has 2 processes, and they are not started yet: call fabric.launch() right after Fabric(...) "
        "[not-launched]"
    )
    assert said["setup"] == said["barrier"] == said["all_reduce"] == not_started
