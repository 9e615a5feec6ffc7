"""Putting files in place: errors that name the path and leave the old file, and leftovers of the dead."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from precision_core import Fabric
from precision_core.checkpoint.storage.atomic import atomically


def write(path: Path) -> None:
    with atomically(path) as new:
        new.write_bytes(b"new")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"old")
    return path


def test_the_new_file_takes_the_place(path: Path) -> None:
    write(path)
    assert path.read_bytes() == b"new" and os.listdir(path.parent) == ["last.ckpt"]


def test_a_folder_in_the_way_is_named_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder is a folder: remove it, or save to .*folder/last\.ckpt"):
        write(tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"]


def test_a_file_where_the_folder_should_be(path: Path) -> None:
    with pytest.raises(OSError, match=r"could not write .*last\.ckpt/new\.ckpt: (File exists|Not a directory)"):
        write(path / "new.ckpt")
    assert path.read_bytes() == b"old"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mounting, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no command mount")
    if done.returncode:
        pytest.skip("mounting a small file system is not permitted")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_and_the_old_checkpoint_loads(small_disk: Path) -> None:
    fabric, path = Fabric(accelerator="cpu"), small_disk / "last.ckpt"
    fabric.save(path, {"value": torch.arange(1000)})
    for large in ({"one": torch.zeros(2**20)}, {str(number): torch.zeros(1000) for number in range(1000)}):
        with pytest.raises(
            OSError, match=r"could not write .*last\.ckpt: No space left .* old file is as it was"
        ) as error:
            fabric.save(path, large)
        assert error.value.errno == 28 and os.listdir(small_disk) == ["last.ckpt"]
    assert torch.equal(fabric.load(path)["value"], torch.arange(1000))


def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    """Root may write where permissions forbid it, but not to /proc."""
    path = Path("/proc/last.ckpt") if os.geteuid() == 0 else tmp_path / "closed" / "last.ckpt"
    if path.parent != Path("/proc"):
        path.parent.mkdir(mode=0o555)
    elif not path.parent.is_dir():
        pytest.skip("there is no /proc")
    with pytest.raises(OSError, match=r"could not write .*last\.ckpt: "):
        Fabric(accelerator="cpu").save(path, {"value": 1})


def start(path: Path, stop: Callable[[], object]) -> int:
    """Returns the id of a process that has written half of `path` and calls `stop`; for the rest it waits for that."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        with atomically(path) as new:
            new.write_bytes(b"half")
            os.write(writer, b"there")
            stop()
        os._exit(0)
    os.read(reader, 5)
    os.close(reader)
    os.close(writer)
    return process


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_stay(path: Path) -> None:
    os.waitpid(start(path, lambda: os.kill(os.getpid(), signal.SIGKILL)), 0)
    assert len(os.listdir(path.parent)) == 2
    go_on = path.parent / "go on"
    living = start(path, lambda: [time.sleep(0.01) for _ in iter(go_on.exists, True)])
    others = {".last.ckpt.bak.partial", ".other.ckpt.0123456789abcdef.partial"}
    for name in others:
        (path.parent / name).write_bytes(b"somebody else's")
    left = {name for name in os.listdir(path.parent) if name.startswith(".last.ckpt.")} - others
    assert len(left) == 1 and path.read_bytes() == b"old"  # the living one removed the dead one's
    write(path)
    assert set(os.listdir(path.parent)) == {"last.ckpt", *others, *left} and path.read_bytes() == b"new"
    go_on.touch()
    assert os.waitpid(living, 0)[1] == 0 and path.read_bytes() == b"half"
    assert set(os.listdir(path.parent)) == {"last.ckpt", "go on", *others}
