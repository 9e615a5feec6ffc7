"""A run that is done ends with exit code zero, however busy the machine and gloo's threads are."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import os, sys, warnings
import torch
from precision_core import Fabric

def talk():
    sys.setswitchinterval(100)  # gloo's threads are not let in while Python code runs
    fabric = Fabric(accelerator="cpu", devices=1, strategy="ddp")
    for _ in range(20):
        fabric.all_reduce(torch.ones(2))
    sys.exit()

failed = 0
for _ in range(int(sys.argv[1])):
    process = os.fork()
    if process == 0:
        talk()
    failed += os.waitpid(process, 0)[1] != 0
print(failed)
"""


def test_the_interpreter_is_not_aborted_at_its_end(times: int) -> None:
    count = 100 * times
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600 * times)
    assert done.stdout == "0\n", f"{done.stdout.strip()} of {count}: {done.stderr[-1000:]}"
