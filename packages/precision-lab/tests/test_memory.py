import pytest
import torch

from precision_core.testing import run_in_ranks
from precision_lab.memory import PeakMemory, explain_full

MIB = 2**20


def peak_of_100_mib():
    before = torch.ones(50 * MIB)  # 200 MiB that do not count
    memory = PeakMemory(torch.device("cpu"))
    taken = torch.ones(25 * MIB)
    del taken
    peak = memory.read()
    assert before.sum() > 0
    return peak


def test_counts_what_was_taken_after_its_construction():
    # a closure, so in a fork of its own: a process that has run other tests has their peak
    (peak,) = run_in_ranks(1, lambda: peak_of_100_mib())
    assert peak is not None
    assert 95 * MIB < peak < 180 * MIB


def test_on_cuda_what_was_there_before_does_not_count(monkeypatch):
    """The text is on the device before the model is."""
    allocated = {"now": 3 * MIB, "peak": 50 * MIB}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: allocated["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: allocated.update(peak=allocated["now"]))
    memory = PeakMemory(torch.device("cuda", 0))
    assert memory.read() == 0
    allocated["peak"] = 10 * MIB
    assert memory.read() == 7 * MIB


@pytest.mark.parametrize(
    ("allocate", "said"),
    [
        (lambda: torch.empty(10**15), "out of memory: it asked for another 3.73e+06 GiB"),
        (lambda: [0] * 10**15, "out of memory: MemoryError: "),
        (lambda: torch.empty(-1), None),
    ],
)
def test_what_runs_out_of_memory_is_told_from_other_errors(allocate, said):
    with pytest.raises((RuntimeError, MemoryError)) as error:
        allocate()
    reason = f"{error.type.__name__}: {error.value}"
    assert explain_full(reason) == ((reason, False) if said is None else (said, True))
