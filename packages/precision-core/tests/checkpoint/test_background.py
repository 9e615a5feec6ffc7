"""Fabric.save(wait=False): a copy is written while training goes on; errors are raised by wait or by the next save."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from precision_core import Fabric
from precision_core.checkpoint.background import copied
from precision_core.checkpoint.storage import file as checkpoint


class Gate:
    """A value whose state is taken at once, in front of a writer that waits until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, write = threading.Event(), checkpoint.write

        def wait_and_write(*args: Any) -> None:
            assert self.opened.wait(30)
            write(*args)

        monkeypatch.setattr(checkpoint, "write", wait_and_write)


def test_what_is_changed_meanwhile_is_not_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fabric, gate = Fabric(accelerator="cpu"), Gate(monkeypatch)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "losses": [1.0]}

    def train() -> None:
        fabric.backward(model(torch.ones(1, 2)).sum())
        optimizer.step()

    train()
    before = [tensor.clone() for tensor in (model.weight, optimizer.state[model.weight]["momentum_buffer"])]
    save = fabric.save(tmp_path / "x", state, wait=False)
    train()
    state["losses"].append(2.0)
    assert not save.done and os.listdir(tmp_path) == []
    gate.opened.set()
    save.wait()
    assert save.done
    fabric.load(tmp_path / "x", state)
    assert torch.equal(model.weight, before[0]) and state["losses"] == [1.0]
    assert torch.equal(optimizer.state[model.weight]["momentum_buffer"], before[1])


def test_a_load_waits_for_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fabric, gate = Fabric(accelerator="cpu"), Gate(monkeypatch)
    fabric.save(tmp_path / "x", {"step": 3}, wait=False)
    threading.Timer(0.2, gate.opened.set).start()
    assert fabric.load(tmp_path / "x") == {"step": 3}


def test_an_error_is_raised_by_wait_or_by_the_next_save_and_once(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu")
    (tmp_path / "file").write_text("in the way")
    wrong = tmp_path / "file" / "below"
    save = fabric.save(wrong, {"step": 1}, wait=False)
    with pytest.raises(OSError, match="could not write"):
        save.wait()
    fabric.save(tmp_path / "x", {"step": 2})  # it was told
    fabric.save(wrong, {"step": 3}, wait=False)
    assert fabric.load(tmp_path / "x") == {"step": 2}
    with pytest.raises(OSError, match="could not write"):
        fabric.save(tmp_path / "x", {"step": 4})
    assert fabric.load(tmp_path / "x") == {"step": 2}
    fabric.save(tmp_path / "x", {"step": 5}, wait=False).wait()
    assert fabric.load(tmp_path / "x") == {"step": 5}


def test_a_value_that_cannot_be_saved_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot save \['x'\]"):
        Fabric(accelerator="cpu").save(tmp_path / "x", {"x": object()}, wait=False)


LAST = """
import sys
from precision_core import Fabric
fabric = Fabric(accelerator="cpu")
fabric.save(sys.argv[1], {"step": 1}, wait=False)
fabric.save(sys.argv[1] + "/below", {"step": 2}, wait=False)
"""


@pytest.mark.slow_start
def test_the_process_ends_after_the_save_and_tells_its_error(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LAST, str(tmp_path / "x")], capture_output=True, text=True, check=True)
    assert f"{tmp_path / 'x' / 'below'} was not saved: FileExistsError" in done.stderr
    assert Fabric(accelerator="cpu").load(tmp_path / "x") == {"step": 1}


def test_tensors_that_are_one_stay_one_in_the_copy() -> None:
    tied = nn.Parameter(torch.ones(2, 3))
    live = {
        "a": tied.detach(),
        "b": tied.detach(),
        "rows": [tied.detach()[0]],
        "c": torch.ones(2, 3),
        "empty": torch.ones(0),
    }
    copy, _ = copied({**live, "sparse": torch.eye(2).to_sparse()})
    assert copy["a"] is copy["b"] and copy["a"].data_ptr() != tied.data_ptr() and copy["c"] is not copy["a"]
    tied.data.fill_(2)
    assert torch.equal(copy["a"], torch.ones(2, 3)) and torch.equal(copy["rows"][0], torch.ones(3))
    assert torch.equal(copy["sparse"].to_dense(), torch.eye(2)) and copy["empty"].shape == (0,)
