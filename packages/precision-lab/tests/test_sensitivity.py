import math

import pytest
import torch
from torch import nn

from precision_lab.loop import Job, Training
from precision_lab.sensitivity import Layer, look, spacing
from precision_lab.task import Task


def training(model, rate=0.1, batch=None, **options):
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]) if batch is None else batch

    def make():
        task = Task(model, torch.optim.SGD(model.parameters(), lr=rate), lambda seed: [x], lambda m, b: m(b).mean())
        for name, value in options.items():
            setattr(task, name, value)
        return task

    made = Training(Job("64-true", 10, 0, "cpu", look=""), lambda device: make)
    list(made.start())
    return made


def layers(*arguments, **options):
    return {layer["name"]: Layer(**layer) for layer in look(training(*arguments, **options))}


def linear(weight):
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([weight])
    return layer


def test_ranges_are_those_of_inputs_outputs_and_gradients():
    found = layers(nn.Sequential(linear([1.0, -2.0]), nn.ReLU()), batch=torch.tensor([[70000.0, 1.0], [1.0, 1.0]]))
    first, relu = found["0"], found["1"]
    assert (first.inputs, first.outputs, first.parameters, first.kind) == (70000.0, 69998.0, 2, "Linear")
    assert (relu.inputs, relu.outputs, relu.parameters) == (69998.0, 69998.0, 0)
    assert relu.gradients == 0.5 and relu.unchanged == {}


def test_rounding_is_gradient_times_error_of_outputs_and_parameters():
    weight = 1 + 2**-9  # a quarter of bfloat16's spacing at one; float16 has it exactly
    found = layers(nn.Sequential(linear([weight, 0.0])), batch=torch.tensor([[1.0, 0.0], [2.0, 0.0]]))["0"]
    outputs = [0.5 * 2**-9, 0.5 * 2**-8]  # a mean of two, each rounded from w and from 2 w
    parameters = [1.5 * 2**-9]  # the gradient of w is the mean input
    assert found.rounding["bfloat16"] == pytest.approx(math.hypot(*outputs, *parameters), rel=1e-12)
    assert found.rounding["float16"] == 0.0


@pytest.mark.parametrize(("rate", "share"), [(1e-4, 1.0), (0.5, 0.0)])
def test_updates_below_half_the_spacing_are_unchanged(rate, share):
    found = layers(nn.Sequential(linear([1.0, 1.0])), rate)["0"]
    assert found.unchanged["bfloat16"] == share


def test_the_schedule_counts_in_the_middle_of_the_run():
    seen = []
    layers(nn.Sequential(linear([1.0, 1.0])), schedule=lambda step, steps: seen.append((step, steps)) or 0.5)
    assert seen == [(5, 10)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_spacing_is_that_of_torch(dtype):
    bits = torch.tensor([1.0, 1.5, 0.1, 300.0, 2**-13], dtype=dtype)
    following = (bits.view(torch.int16) + 1).view(dtype)
    assert torch.equal(spacing(bits.double(), dtype), following.double() - bits.double())


def test_layers_of_several_outputs_are_looked_at():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(2, 3, batch_first=True)
            self.free = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.lstm(x[:, None])[0] * self.free

    found = layers(Last())
    assert set(found) == {"", "lstm"} and found["lstm"].rounding["bfloat16"] > 0
    assert found[""].parameters == 3 and found[""].rounding["bfloat16"] > 0  # of its output: ones round to themselves
