import pytest
import torch
from torch import nn

from precision_core import Policy
from precision_lab.loop import Job, Training
from precision_lab.task import Task
from precision_lab.updates import ELEMENTS, Unchanged


class Two(nn.Module):
    """One parameter whose steps bfloat16 takes, and one whose it does not."""

    def __init__(self):
        super().__init__()
        self.small = nn.Parameter(torch.full((30,), 2**-10))
        self.large = nn.Parameter(torch.full((10,), 1.0))

    def forward(self, x):
        return (self.small.sum() + self.large.sum()) * x


def make():
    model = Two()
    return Task(model, torch.optim.SGD(model.parameters(), lr=2**-10), lambda s: [torch.ones(1)], lambda m, b: m(b))


def counts(mode, look="updates"):
    training = Training(Job(mode, 3, 0, "cpu", look=look), lambda device: make)
    events = [*training.start(), *training.advance(3), *training.finish()]
    return next((event["unchanged"] for event in events if "unchanged" in event), None)


def test_elements_that_do_not_move_are_counted():
    assert counts("bf16-true") == [["small", 0, 30], ["large", 10, 10]]


@pytest.mark.parametrize("mode", ["32-true", "bf16-mixed", "bf16-stochastic", "bf16-master"])
def test_modes_that_lose_none_are_not_looked_at(mode):
    assert counts(mode) == []


def test_nobody_looks_who_was_not_asked():
    assert counts("bf16-true", "") is None


def test_large_parameters_are_sampled_and_their_share_is_of_all():
    model = nn.Linear(100, 100, bias=False).to(torch.bfloat16)
    model.weight.data.fill_(1.0)
    watch = Unchanged(model, Policy.parse("bf16-true"), 1)
    model.weight.grad = torch.ones_like(model.weight)
    model.weight.grad[50:] = 0  # without a gradient nothing is swallowed
    with watch.sampling(0):
        model.weight.data[:25] += 1
    (name, same, seen) = watch.counts()[0]
    assert (name, seen) == ("weight", 10000) and same == pytest.approx(5000, abs=10000 / ELEMENTS * 4)


def test_a_run_that_goes_on_counts_those_before_too(tmp_path):
    def training(resume=""):
        return Training(Job("bf16-true", 3, 0, "cpu", resume=resume), lambda device: make)

    first = training()
    list(first.start())
    list(first.advance(2))
    first.save(str(tmp_path / "half.ckpt"))
    second = training(str(tmp_path / "half.ckpt"))
    list(second.start())
    assert second._unchanged.counts() == [("small", 0, 30), ("large", 10, 10)]
