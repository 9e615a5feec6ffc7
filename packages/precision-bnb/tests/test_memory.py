"""Memory: a float file becomes packed weights with one chunk of floats in memory at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

MEASURE = """
import logging, sys, threading, torch
logging.disable(logging.WARNING)
from pathlib import Path
from torch import nn
from precision_bnb import BitsandbytesPrecision
from precision_core import Fabric

def anonymous():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

torch.set_num_threads(1)
fabric = Fabric(accelerator="cpu", precision=BitsandbytesPrecision("nf4", torch.float32))
fabric.precision_plugin.convert_module(nn.Sequential(nn.Linear(64, 64)))
with fabric.init_module():
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(4)))
peak, done, before = 0, threading.Event(), anonymous()
def watch():
    global peak
    while not done.wait(0.003):
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch)
thread.start()
fabric.load_module(sys.argv[1], model)
done.set()
thread.join()
print(max(peak, anonymous()) - before, sum(param.nbytes for param in model.parameters()))
"""


@pytest.mark.slow_start
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_float_model_never_exists(tmp_path: Path) -> None:
    layer = torch.randn(2048, 2048)
    save_file({f"{n}.weight": layer + n for n in range(4)}, tmp_path / "floats.safetensors")  # 67 MB
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "floats.safetensors")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    peak, packed = map(int, result.stdout.split())
    assert peak < 1.15 * packed + layer.nbytes, result.stdout
