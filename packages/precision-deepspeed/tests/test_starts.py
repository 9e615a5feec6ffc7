"""A script trains to the same values however it is started: alone, by itself, by torchrun, by DeepSpeed's launcher."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from precision_core import Fabric

SCRIPT = """
import json, pathlib, sys
import torch
from precision_core import Fabric

def main():
    out, devices = sys.argv[1], sys.argv[2]
    torch.set_num_threads(1)
    fabric = Fabric(accelerator="cpu", strategy="deepspeed", devices=int(devices), precision="bf16-mixed")
    fabric.launch()
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizer.zero_grad()
        share = rows.chunk(fabric.world_size)[fabric.global_rank]
        fabric.backward((model(share) - share.sum(1, keepdim=True)).pow(2).mean())
        optimizer.step()
    values = fabric.all_gather(torch.cat([param.detach().flatten() for param in model.parameters()]))
    if fabric.is_global_zero:
        found = {"values": values.tolist(), "world_size": fabric.world_size}
        pathlib.Path(out).write_text(json.dumps(found))
    fabric.teardown()

if __name__ == "__main__":
    main()
"""
BIN = Path(sys.executable).parent
VARIABLES = {
    name: text
    for name, text in os.environ.items()
    if name not in {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
}


def port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


STARTS = {
    "alone": (1, [sys.executable]),
    "by itself": (2, [sys.executable]),
    "torchrun": (2, [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]),
    # DS_ACCELERATOR is how the launcher is told of a machine without GPUs.
    "deepspeed": (2, [sys.executable, str(BIN / "deepspeed"), "--num_gpus", "2", "--no_local_rank"]),
}


def one_device() -> list[float]:
    """Returns what the script's values are without DeepSpeed, in this process."""
    fabric = Fabric(accelerator="cpu", precision="bf16-mixed")
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizer.zero_grad()
        fabric.backward((model(rows) - rows.sum(1, keepdim=True)).pow(2).mean())
        optimizer.step()
    return [value for param in model.parameters() for value in param.flatten().tolist()]


def started(how: str, folder: Path) -> dict[str, list[list[float]]]:
    ranks, command = STARTS[how]
    (folder / "script.py").write_text(SCRIPT)
    variables = {**VARIABLES, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    if how == "deepspeed":
        command = [*command, "--master_port", port()]
        variables["DS_ACCELERATOR"] = "cpu"
    command = [*command, str(folder / "script.py"), str(folder / "out.json"), str(ranks)]
    finished = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr[-3000:]
    found: dict[str, list[list[float]]] = json.loads((folder / "out.json").read_text())
    assert found.pop("world_size") == ranks
    return found


@pytest.mark.slow_start
@pytest.mark.parametrize(
    "how",
    [
        "alone",
        # two processes that import DeepSpeed take more than the fast tier gives a test
        *(pytest.param(how, marks=pytest.mark.full) for how in ("by itself", "torchrun", "deepspeed")),
    ],
)
def test_all_processes_end_where_one_device_does(how: str, tmp_path: Path) -> None:
    values, expected = started(how, tmp_path)["values"], one_device()
    assert len(values) == STARTS[how][0] and all(each == values[0] for each in values)
    assert values[0] == pytest.approx(expected, abs=2e-3)  # halves of a batch, averaged in float32
    assert any(abs(value) > 0.2 for value in expected)
