import os
import re
import sys
from contextlib import closing
from importlib.metadata import DistributionFinder, MetadataPathFinder, distributions

import pytest
import torch

from precision_lab import train as train_module
from precision_lab.process import Fork
from precision_lab.text import split_text

# These models are tiny: a second thread only waits for the first, and on a busy machine for much longer than that.
torch.set_num_threads(1)


def normalized(name):
    return re.sub("[-_.]+", "-", name).lower()


def needed(*names):
    """The installed distributions of these names, and what they require."""
    installed = {normalized(each.metadata["Name"]): each for each in distributions() if each.metadata["Name"]}
    found = {}
    for name in map(normalized, names):
        requires = [each for each in installed[name].requires or () if "extra ==" not in each]
        found |= {each: installed[each] for each in (name, *(normalized(re.match(r"[\w.-]+", r)[0]) for r in requires))}
    return list(found.values())


SEARCHED = set(sys.path)
BARE = needed("precision-core", "precision-lab")


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps the first mixed precision of a process; a test of another package may have chosen one."""
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module", autouse=True)
def bare():
    """Lab as it is installed alone: of what is installed here, this process sees core, lab and what they require.

    What a test installs is seen. Processes that a test starts see everything.
    """
    find = MetadataPathFinder.find_distributions

    def find_bare(context=DistributionFinder.Context()):  # noqa: B008
        wanted = context.name and normalized(context.name)
        path = [folder for folder in context.path if folder not in SEARCHED]
        yield from find(DistributionFinder.Context(name=context.name, path=path))
        yield from (each for each in BARE if wanted in (None, normalized(each.metadata["Name"])))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetadataPathFinder, "find_distributions", staticmethod(find_bare))
        yield


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a distribution for this test, here and in child processes: its metadata, and by choice a module."""
    modules = {}  # what was there under each module's name

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
            modules.setdefault(module, sys.modules.get(module))
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)

    yield install
    for module, before in modules.items():
        sys.modules.pop(module, None)
        if before is not None:  # a second import of a package would find its submodules there, and not take them in
            sys.modules[module] = before


@pytest.fixture(scope="session")
def fork():
    """In place of `Child`: the same events and the same failure of a job, in a fork of this process.

    That has imported torch already; it takes one window of the text a step, and evaluates on little.
    """

    def fork(job, told, batch=1):
        def make():  # in the fork: what it patches stays there
            training, held_out = split_text()
            train_module.split_text = lambda: (training, held_out[:300])
            train_module.BATCH = batch
            return train_module.gpt_maker(torch.device("cpu"), job.size)()

        assert job.devices == 1
        return Fork(job, make, told)

    return fork


@pytest.fixture(scope="session")
def forked(fork):
    """The events of a job, trained in a fork at once."""

    def forked(job, batch=1):
        with closing(fork(job, False, batch)) as child:
            yield from child.events()

    return forked
