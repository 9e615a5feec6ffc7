import os

import pytest
import torch

# These models are tiny: a second thread only waits for the first, and on a busy machine for much longer than that.
torch.set_num_threads(1)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a distribution for this test, here and in child processes: its metadata, and by choice a module."""

    def install(name, entry_points="", module="", source="", version="1.0", requires=()):
        folder = tmp_path / name
        metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir(parents=True)
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {each}" for each in requires]
        (metadata / "METADATA").write_text("\n".join(lines) + "\n")
        (metadata / "entry_points.txt").write_text(entry_points)
        if module:
            (folder / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)

    return install
