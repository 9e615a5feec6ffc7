"""Launching for real: scripts, modules, functions, torchrun, and what a failing rank leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

LIMIT = 120  # seconds; importing torch alone takes several on a busy machine

TRAIN = """
import os, sys, time
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
            print("failing at", time.time(), flush=True)
            raise ValueError("rank one has had enough")
    weights = fabric.all_gather(model.weight.detach())
    assert torch.equal(weights[0], weights[1])
    fabric.print("args", sys.argv[1:], "world", fabric.world_size)

if __name__ == "__main__":
    main()
"""


def run(*command: str, folder: Path, **options: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1", **options},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "__main__.py").write_text(TRAIN)
    return tmp_path


@pytest.mark.parametrize("start", [["train.py"], ["-m", "package"]], ids=" ".join)
def test_a_script_or_module_starts_again_in_each_process(start: list[str], folder: Path) -> None:
    done = run(*start, "--lr", "0.1", folder=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "args ['--lr', '0.1'] world 2\n"


def test_under_torchrun_it_joins(folder: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py", "x")
    done = run(*torchrun, folder=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "args ['x'] world 2\n"


IN_TURN = """
import torch
from precision_core import Fabric

for number in range(20):
    fabric = Fabric(accelerator="cpu", devices=2)
    fabric.launch()
    model = fabric.setup(torch.nn.Linear(2, 1))
    fabric.backward(model(torch.randn(4, 2)).sum())
    fabric.print(number, flush=True)
    fabric.teardown()
"""


def test_one_fabric_follows_another(folder: Path) -> None:
    """Else the third finds on torchrun's store what is left of the second, and waits for ever."""
    (folder / "turns.py").write_text(IN_TURN)
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "turns.py", folder=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(number) for number in range(20)]


def test_torchrun_with_another_number_is_refused_naming_both(folder: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "train.py")
    done = run(*torchrun, folder=folder)
    assert done.returncode != 0
    assert "Fabric(devices=2, num_nodes=1) does not fit how this process was launched: 3 processes" in done.stderr


def test_one_failing_rank_ends_the_job_its_traceback_first_and_leaves_no_orphans(folder: Path) -> None:
    done = run("train.py", "--fail", folder=folder)
    ended = time.time()
    assert done.returncode != 0
    assert ended - float(done.stdout.removeprefix("failing at ")) < 10
    tracebacks = [line for line in done.stderr.splitlines() if "Traceback" in line]
    assert tracebacks[0].startswith("[rank1]")
    assert "ValueError: rank one has had enough" in done.stderr
    assert not processes_of(folder)


def processes_of(folder: Path) -> list[str]:
    listing = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listing.splitlines() if str(folder) in line]


HANGS = """
import time
from precision_core import Fabric

fabric = Fabric(accelerator="cpu", devices=2)
fabric.launch()
if fabric.global_rank == 1:
    print(time.time(), flush=True)
    raise RuntimeError("gone")
time.sleep(1000)
"""


def test_a_rank_that_waits_elsewhere_is_ended_too(folder: Path) -> None:
    (folder / "hangs.py").write_text(HANGS)
    done = run("hangs.py", folder=folder)
    assert done.returncode != 0 and "[rank1]: RuntimeError: gone" in done.stderr
    assert time.time() - float(done.stdout) < 10
    assert not processes_of(folder)


ONE_LINE = r"__import__('os').write(1, b'up\n')"  # at once: two prints of unbuffered processes may mix


def test_an_interrupt_ends_all_processes(folder: Path) -> None:
    (folder / "hangs.py").write_text(
        HANGS.replace("fabric.global_rank == 1", "False").replace("time.sleep", ONE_LINE + "; time.sleep")
    )
    process = subprocess.Popen(
        [sys.executable, str(folder / "hangs.py")],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["up\n", "up\n"]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    assert not processes_of(folder)


@pytest.mark.parametrize("start", [["-"], ["-c", TRAIN.replace("--fail", "-")]], ids=["stdin", "-c"])
def test_without_a_script_it_says_so(start: list[str], folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, *start], cwd=folder, input=TRAIN, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 1
    assert "RuntimeError: fabric.launch() has no script to start 2 times" in done.stderr
    assert "pass a function (fabric.launch(train))" in done.stderr


FUNCTION = """
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


def test_a_function_runs_in_new_processes_and_returns_rank_zeros_value(folder: Path) -> None:
    (folder / "function.py").write_text(FUNCTION)
    done = run("function.py", folder=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "got 30.0\nfailed as it should\n"


def test_a_function_that_was_typed_in_runs_too(folder: Path) -> None:
    code = textwrap.dedent(
        """
        from precision_core import Fabric
        def train(fabric):
            return fabric.world_size
        print(Fabric(accelerator="cpu", devices=2).launch(train))
        """
    )
    done = run("-c", code, folder=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2\n"


def test_what_needs_the_processes_says_that_they_are_not_started(folder: Path) -> None:
    code = textwrap.dedent(
        """
        import torch
        from precision_core import Fabric
        fabric = Fabric(accelerator="cpu", devices=2)
        assert (fabric.world_size, fabric.global_rank, fabric.is_global_zero) == (2, 0, True)
        model, one = torch.nn.Linear(1, 1), torch.ones(1)
        calls = [lambda: fabric.setup(model), fabric.barrier, lambda: fabric.all_reduce(one)]
        for call in calls:
            try:
                call()
            except RuntimeError as error:
                print(error)
        """
    )
    done = run("-c", code, folder=folder)
    assert done.returncode == 0, done.stderr
    message = "this run has 2 processes, and they are not started yet: call fabric.launch() right after Fabric(...)\n"
    assert done.stdout == message * 3


WITH_VARIABLES = """
import os, sys
from precision_core import Fabric, SingleDeviceStrategy

class Picky(SingleDeviceStrategy):
    def missing_variables(self):
        return {} if os.environ.get("BEADS") == "7" else {"BEADS": "7"}

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


def test_a_process_is_started_with_the_variables_that_a_strategy_needs(folder: Path) -> None:
    (folder / "picky.py").write_text(WITH_VARIABLES)
    done = run("picky.py", "script", folder=folder)
    assert done.returncode == 0 and done.stdout == "(9, 1) ['script']\n", done.stderr
    done = run("picky.py", "function", folder=folder)
    assert done.stdout == "(8, 1) False\n", done.stderr
    assert "this run needs a process that was started with BEADS=7: call fabric.launch() right after" in done.stderr
    done = run("-c", WITH_VARIABLES, "script", folder=folder)
    assert "no script to start again" in done.stderr and "start with BEADS=7" in done.stderr
