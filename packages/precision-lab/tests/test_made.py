"""Values that a task's own code has in memory: they are replaced, and told."""

import threading

import pytest
import torch
from torch import nn

from precision_lab import estimate
from precision_lab.footprint import trace
from precision_lab.made import fake_batch, made
from precision_lab.taskfile import guarded
from precision_lab.tracker import fake_mode


def in_a_thread(function):
    """As transformers reads files: a thread is not in the mode of the one that waits for it."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def tied_model():
    model = nn.Sequential(nn.Linear(50, 50), nn.BatchNorm1d(50), nn.Linear(50, 50))
    model[2].weight = model[0].weight
    model[2].bias.requires_grad_(False)
    return model


def task(model, optimizer=torch.optim.Adam):
    return model, optimizer(model.parameters()), [torch.ones(4, 50)], lambda model, x: model(x).mean()


def with_values():
    return task(in_a_thread(tied_model))


def without():
    return task(tied_model())


def needing_values():
    model = tied_model()
    model[0].weight.detach().numpy()  # a fake tensor has none to give
    return task(model)


def adagrad():
    return task(in_a_thread(tied_model), torch.optim.Adagrad)


BYTES = 4 * (2500 + 50 + 4 * 50 + 50) + 8


@pytest.mark.parametrize("mode", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("make", [with_values, needing_values])
def test_the_footprint_is_that_of_a_model_without_values(make, mode):
    found, expected = trace(mode, guarded(make)), trace(mode, guarded(without))
    assert (found.loaded, expected.loaded) == (BYTES, 0)
    for kind in ("params", "grads", "master", "optimizer", "buffers", "numbers", "trained"):
        assert getattr(found, kind) == getattr(expected, kind)
    assert found.peak == pytest.approx(expected.peak, abs=2000)  # of the batch, whose values may be had, too
    assert found.numbers == 2500 + 200 and found.trained == found.numbers - 50


def test_parameters_stay_tied_and_are_those_of_the_optimizer():
    with fake_mode():
        made_task, size = made(guarded(adagrad))
    first, _, last = made_task.model
    (group,) = made_task.optimizer.param_groups
    assert size == BYTES and first.weight is last.weight is group["params"][0] and not last.bias.requires_grad
    states = made_task.optimizer.state
    assert set(states) == {param for param in group["params"] if param in states} and len(states) == 5
    fakes = [*made_task.model.parameters(), *made_task.model.buffers(), states[first.weight]["sum"]]
    assert {type(each) for each in fakes} == {torch._subclasses.FakeTensor}


def test_it_is_told_where_values_were_in_memory():
    found = estimate(with_values, "32-true")
    assert "make() had the model's values in memory for that, 10.9 KiB" in repr(found)
    assert found.as_dict()["modes"][0]["loaded"] == BYTES
    assert "in memory" not in repr(estimate(without, "32-true"))


def test_packed_weights_are_a_row_that_says_what_to_do():
    class Packed(nn.Parameter):
        pass

    def make():
        model = in_a_thread(tied_model)
        model[0].weight = Packed(torch.Tensor._make_subclass(torch.Tensor, in_a_thread(lambda: torch.ones(50, 50))))
        return task(model)

    (row,) = estimate(make, "32-true").rows
    assert "holds a Packed, which cannot be had without values" in row.reason and "precision compare" in row.reason


def test_a_batch_is_new_each_time_and_keeps_its_shape():
    real = {"ids": torch.ones(2, 3, dtype=torch.int64), "text": "words"}
    with fake_mode():
        first, second = fake_batch(real), fake_batch(real)
        assert fake_batch(first)["ids"] is first["ids"] is not second["ids"]
    assert first["text"] == "words" and first["ids"].dtype is torch.int64 and first["ids"].shape == (2, 3)
