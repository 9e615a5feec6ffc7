"""On a TPU, in processes of their own: nobody has run these yet, for want of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from precision_xla.support import find_tpus

pytestmark = pytest.mark.skipif(not find_tpus(), reason="there is no TPU here: neither /dev/accel* nor /dev/vfio/*")

SCRIPT = """
import torch
from precision_core import Fabric
from precision_core.testing.net import Net, loss_of, make_batch
from precision_xla import vendor
from precision_xla.programs import matrix_products

def train(fabric):
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    fabric.setup(model, optimizer)
    losses = []
    for step in range(30):
        batch, target = make_batch(step, device=fabric.device)
        if step == 10:
            before = vendor.counts()
        optimizer.zero_grad()
        loss = loss_of(model(batch), target)
        fabric.backward(loss)
        if step == 0:
            products = matrix_products(vendor.hlo([param.grad for param in model.parameters() if param.requires_grad]))
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        losses.append(loss)
    done = vendor.counts() - before
    assert set(products) == {torch.bfloat16}, products
    assert (done.compilations, done.executions, done.reads) == (0, 20, 0), done
    return losses[0].item(), losses[-1].item(), fabric.world_size

if __name__ == "__main__":
    first, last, world_size = train(Fabric(accelerator="tpu", strategy="xla", precision="bf16-mixed"))
    assert last < first
    print("processes", world_size)
"""


def test_it_trains(run_python: Any, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = run_python("-u", str(script), PJRT_DEVICE=None, XLA_FLAGS=None)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "processes 1" in done.stdout


@pytest.mark.parametrize("mode", ["16-mixed", "16-true", "64-true"])
def test_what_it_lacks_is_refused(mode: str, run_python: Any) -> None:
    program = f"from precision_core import Fabric; Fabric(accelerator='tpu', strategy='xla', precision='{mode}')"
    assert "cannot run under XLAStrategy on xla:0: a TPU" in run_python(program, PJRT_DEVICE=None).stderr
