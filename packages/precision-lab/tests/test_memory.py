import torch

from precision_lab.memory import PeakMemory

MIB = 2**20


def test_counts_what_was_taken_after_its_construction():
    before = torch.ones(50 * MIB)  # 200 MiB that do not count
    memory = PeakMemory(torch.device("cpu"))
    taken = torch.ones(25 * MIB)
    del taken
    peak = memory.read()
    assert before.sum() > 0
    assert peak is not None
    assert 95 * MIB < peak < 180 * MIB
