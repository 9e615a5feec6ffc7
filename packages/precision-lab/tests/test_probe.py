import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from precision_lab import Task
from precision_lab.loop import Job
from precision_lab.probe import MOST, SAMPLE, decibels, first_excess, noise, sampled


def test_decibels_are_those_of_energies():
    reference = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert decibels(reference * 1.001, reference) == pytest.approx(60)
    assert decibels(reference, reference) == MOST and decibels(torch.tensor([math.inf, 0]).double(), reference) == -MOST
    assert decibels(None, reference) is decibels(reference, reference[:1]) is decibels(reference, 0 * reference) is None


def test_a_sample_is_by_position():
    tensor = torch.arange(4 * SAMPLE).view(2, -1)
    assert torch.equal(sampled(tensor), torch.arange(0, 4 * SAMPLE, 4).double())
    assert torch.equal(sampled(torch.ones(3)), torch.ones(3).double())


def test_the_first_layer_with_more_noise_than_depth_explains():
    def at(*amplitudes):
        return [-20 * math.log10(amplitude) for amplitude in amplitudes]

    assert first_excess(at(1e-3, 1.4e-3, 1.7e-3, 2e-3)) is None
    assert first_excess(at(1e-3, 1.4e-3, 1.4e-2, 2e-2)) == 2
    assert first_excess([None, *at(1e-3), None, *at(1e-1)]) == 3
    assert first_excess([]) is None
    assert first_excess(at(1e-16, 1e-3)) == 1 and first_excess(at(1e-16, 1e-3), roundoff=1e-3) is None


class Cancels(nn.Module):
    """Takes the small difference of two large numbers: what rounding leaves of it is noise."""

    def forward(self, x):
        return (x + 300.0) - 300.0


def make():
    layers = nn.Linear(16, 16), nn.Tanh(), Cancels(), nn.Linear(16, 1)
    model = nn.Sequential(*layers)
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    return Task(
        model, torch.optim.SGD(model.parameters(), lr=0.1), lambda seed: [x], lambda m, x: F.mse_loss(m(x), x[:, :1])
    )


@pytest.mark.parametrize(("mode", "least", "most"), [("32-true", 130, 160), ("bf16-true", 45, 65)])
def test_noise_is_that_of_the_format_until_a_layer_cancels(mode, least, most):
    found = {name: (output, gradient) for name, output, gradient in noise(Job(mode, 1, 0, "cpu"), make)}
    assert list(found) == ["0", "1", "2", "3"]
    assert least < found["0"][0] < most and found["2"][0] < found["1"][0] - 25
    assert first_excess([output for output, _ in found.values()]) == 2
    assert found["2"][1] is not None and found["2"][1] < most


def test_gradients_of_a_scaled_loss_are_unscaled():
    ((*_, gradient),) = noise(Job("16-mixed", 1, 0, "cpu"), make)[-1:]
    assert 15 < gradient < 100  # with its scale on it would be far below 0


def test_float64_against_itself_has_no_noise():
    assert all(row[1:] == (MOST, MOST) for row in noise(Job("64-true", 1, 0, "cpu"), make))
