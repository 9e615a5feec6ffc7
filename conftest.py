"""What all tests share: the two tiers, what each test costs, and a slice of the slow ones.

The fast tier is `-m "not full"`. It runs ranks that are kept from one test to the next, says what was left to the full
tier, and fails where a test took longer than it lets one, in its place and once more alone. `--slice-minutes 5
--slice-seed TEXT` with `-m full` runs as many of the marked tests as fit into the time, in an order that the text
decides.
"""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# A compiler that starts processes of its own has each import torch: for kernels as small as the tests' that is all.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

LIMIT, LIMIT_OF_STARTS = 5.0, 20.0
"""CPU seconds, of the process and its children, that a test of the fast tier may take on an idle machine; the second
where it is marked slow_start."""
YARDSTICK = 0.2
"""CPU seconds of `_yardstick` on the idle machine that LIMIT is meant for: 2 cores of an AMD EPYC of 2021."""
START = 2.5
"""CPU seconds that `import torch` takes there. Memory and files may be slow where arithmetic is not: 9 s were seen
beside a yardstick of 0.19."""
SHOWN = 15
TRIES = 5
"""How many tests that took too long are tried once more, alone: what else a machine runs, a cold disk or a first import
can make one test look slow. Where there are more, no chance explains them."""

COSTS = pytest.StashKey["Costs"]()
DEADLINE = pytest.StashKey[float]()
BEFORE = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tiers")
    group.addoption("--slice-minutes", type=float, default=0.0, help="skip what has not begun by then")
    group.addoption("--slice-seed", default="", help="decides the order, so that each commit's slice is another")
    group.addoption("--no-second-try", action="store_true", help="a test that took too long fails the session at once")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[COSTS] = Costs()
    config.pluginmanager.register(config.stash[COSTS])
    if minutes := config.getoption("slice_minutes"):
        config.stash[DEADLINE] = time.time() + 60 * minutes


def _is_fast(config: pytest.Config) -> bool:
    return bool(config.option.markexpr == "not full")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if DEADLINE in config.stash:  # whole files, as their fixtures and caches are theirs
        seed = config.getoption("slice_seed")
        files = sorted({item.path for item in items})
        random.Random(seed).shuffle(files)
        items.sort(key=lambda item: files.index(item.path))


# -------------------------------------------------------------------- each test


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[BEFORE] = _cpu_seconds()
    if time.time() > item.config.stash.get(DEADLINE, float("inf")):
        pytest.skip("beyond this slice")
    if _is_fast(item.config) and "precision_core.testing.ranks" in sys.modules:
        # a test that patches wants ranks that are forked with its patches
        patches = "monkeypatch" in getattr(item, "fixturenames", ())
        package = item.path.relative_to(item.config.rootpath).parts[:2]
        sys.modules["precision_core.testing.ranks"].POOLS.choose(None if patches else "/".join(package))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    try:
        return (yield)
    finally:
        seconds = _cpu_seconds() - item.stash[BEFORE]
        limit = LIMIT_OF_STARTS if item.get_closest_marker("slow_start") else LIMIT
        item.user_properties.append(("cpu", (seconds, limit, _slowness() if seconds > limit else 1.0)))
        _check_nothing_is_left()


def _check_nothing_is_left() -> None:
    """Fails the test that leaves behind what others then run with."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        pytest.fail("this test left a process group behind: end it (fabric.teardown()), or use run_in_ranks")
    if torch.get_default_dtype() is not torch.float32:
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        pytest.fail(f"this test left {dtype} behind as torch's default dtype")


def _cpu_seconds() -> float:
    times = os.times()
    pools = getattr(sys.modules.get("precision_core.testing.ranks"), "POOLS", None)
    kept = pools.cpu_seconds if pools else 0.0
    return times.user + times.system + times.children_user + times.children_system + kept


def _slowness() -> float:
    """Returns how many times longer a test may take here: 1 on a machine as fast and as idle as the limits are for.

    On one that is not, two measures say too little of what its caches, memory and files do to a test: 1.6 s on an idle
    machine were 7.3 s on one that either measure called 1.4 times slower. So a slow machine gets twice what they say.
    """
    slowness = max(_yardstick() / YARDSTICK, _start() / START)
    return 2 * slowness if slowness > 1.2 else 1.0


def _yardstick() -> float:
    """Returns the CPU seconds of a fixed piece of work: more on a slow CPU, and where another shares its core."""
    start = time.process_time()
    sum(number * number for number in range(4_000_000))
    return time.process_time() - start


@functools.cache  # it takes seconds, and is asked only where a test took too long
def _start() -> float:
    """Returns the CPU seconds of a process that imports torch."""
    before = os.times()
    subprocess.run([sys.executable, "-c", "import torch"], check=False)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


# -------------------------------------------------------------------- the end


class Costs:
    """What the tests took and which were left out: in one process, or of all of pytest-xdist's."""

    def __init__(self) -> None:
        self.left: Counter[str] = Counter()
        self._taken: dict[str, tuple[float, float, float]] = {}

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.left.update(item.nodeid.partition("::")[0] for item in items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if cpu := dict(report.user_properties).get("cpu"):
            self._taken[report.nodeid] = cpu  # type: ignore[assignment]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.left = Counter(getattr(node, "workeroutput", {}).get("left", {})) or self.left  # of each worker the same

    def over(self) -> dict[str, str]:
        """Returns the tests that took longer than the fast tier lets them, each with a line that says so."""
        return {
            test: f"{test}: {cpu:.1f} of {limit:.0f} CPU seconds, where {slowness:.1f} times that is allowed"
            for test, (cpu, limit, slowness) in self._taken.items()
            if cpu > limit * slowness
        }

    def try_again(self, root: Path) -> None:
        """Runs what took too long once more, alone; what is fast then counts as fast."""
        over = self.over()
        for test in over if len(over) <= TRIES else ():
            options = ("-q", "-m", "not full", "--no-second-try", "--rootdir", str(root))
            again = subprocess.run([sys.executable, "-m", "pytest", *options, test], cwd=root, capture_output=True)
            if again.returncode == pytest.ExitCode.OK:
                cpu, limit, _ = self._taken[test]
                self._taken[test] = cpu, limit, cpu / limit

    def slowest(self) -> list[str]:
        """Returns a line for each of the slowest tests, and what all of them took."""
        order = sorted(self._taken.items(), key=lambda entry: -entry[1][0])[:SHOWN]
        total = sum(cpu for cpu, *_ in self._taken.values())
        return [
            *(f"{cpu:6.1f} s  {test}" for test, (cpu, *_) in order),
            f"{total:6.1f} s  all {len(self._taken)} tests",
        ]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    config: Any = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["left"] = dict(config.stash[COSTS].left)
    if "precision_core.testing.ranks" in sys.modules:
        sys.modules["precision_core.testing.ranks"].POOLS.close()
    costs = config.stash[COSTS]
    if _is_fast(config) and costs.over() and session.exitstatus == pytest.ExitCode.OK:
        if not (hasattr(config, "workerinput") or config.getoption("no_second_try")):
            costs.try_again(config.rootpath)
        if costs.over():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    yield  # after the reasons for skips, of which there are many: what fails the session stands at its end
    config = terminalreporter.config
    costs = config.stash[COSTS]
    if not _is_fast(config):
        return
    terminalreporter.section("slowest, in CPU seconds with child processes")
    for line in costs.slowest():
        terminalreporter.line(line)
    if costs.left:
        terminalreporter.section("left to the full tier")
        for file, number in sorted(costs.left.items()):
            terminalreporter.line(f"{number:6}  {file}")
        terminalreporter.line(f"{costs.left.total():6}  tests")
    if over := costs.over():
        terminalreporter.section("too slow for the fast tier, and not marked full", red=True)
        for line in over.values():
            terminalreporter.line(line)
