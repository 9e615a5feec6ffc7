import subprocess
import sys
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from precision_lab import Task, task_template
from precision_lab.task import HELD_OUT_BATCHES, HELD_OUT_SEED, share, understood


def parts():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def batches(seed):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(4, 3, generator=generator), torch.randint(2, (4,), generator=generator)


def by_hand(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), F.cross_entropy, by_hand])
def test_a_tuple_is_a_task_and_a_criterion_a_loss(criterion):
    model, optimizer = parts()
    task = understood((model, optimizer, batches, criterion))
    batch = next(task.stream(7))
    assert torch.equal(batch[0], next(batches(7))[0])
    assert torch.equal(task.compute_loss(model, batch), by_hand(model, batch))


class OwnLoss(nn.Linear):
    """As transformers' models: keywords come in, an output with a loss goes out."""

    def forward(self, inputs, labels=None):
        logits = super().forward(inputs)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_a_model_with_a_loss_of_its_own_needs_none():
    torch.manual_seed(0)
    model = OwnLoss(3, 2)
    task = Task(model, torch.optim.SGD(model.parameters()), batches)
    inputs, labels = next(batches(0))
    expected = F.cross_entropy(nn.functional.linear(inputs, model.weight, model.bias), labels)
    assert torch.equal(task.compute_loss(model, {"inputs": inputs, "labels": labels}), expected)
    assert torch.equal(task.compute_loss(model, (inputs, labels)), expected)
    with pytest.raises(TypeError, match="OwnLoss returned no loss: give it labels"):
        task.compute_loss(model, {"inputs": inputs})


def numbers(loader, seed, count):
    model, optimizer = parts()
    return [batch[0].tolist() for batch in islice(Task(model, optimizer, loader, by_hand).stream(seed), count)]


def test_a_loader_goes_on_epoch_after_epoch_and_shuffles_by_the_seed():
    loader = DataLoader(TensorDataset(torch.arange(10)), batch_size=5, shuffle=True)
    torch.manual_seed(1)
    first = numbers(loader, 3, 4)
    before = torch.get_rng_state()
    assert numbers(loader, 3, 4) == first  # wherever torch's generator stands, which stays there
    assert torch.equal(before, torch.get_rng_state())
    assert sorted(first[0] + first[1]) == sorted(first[2] + first[3]) == list(range(10))
    assert first[:2] != first[2:] and numbers(loader, 4, 4) != first


def test_a_finite_iterable_is_started_again_and_an_empty_one_is_an_error():
    model, optimizer = parts()
    task = Task(model, optimizer, [(1,), (2,)], by_hand)
    assert list(islice(task.stream(0), 5)) == [(1,), (2,), (1,), (2,), (1,)]
    with pytest.raises(ValueError, match="has no batch"):
        next(Task(model, optimizer, [], by_hand).stream(0))


def test_held_out_is_the_mean_over_batches_of_a_seed_that_is_not_trained_on():
    model, optimizer = parts()
    seen = []

    class Watched(nn.Module):
        def forward(self, x):
            seen.append((self.training, torch.is_grad_enabled()))
            return model(x)

    watched = Watched()
    loss = Task(watched, optimizer, batches, by_hand).held_out(watched)
    expected = [by_hand(model, batch).item() for batch in islice(batches(HELD_OUT_SEED), HELD_OUT_BATCHES)]
    assert loss == pytest.approx(sum(expected) / 16) and watched.training
    assert seen == [(False, False)] * 16
    assert Task(model, optimizer, batches, by_hand, lambda model: torch.tensor(3.5)).held_out(model) == 3.5


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Linear(1, 1), "returned an object of type Linear: expected precision_lab.Task"),
        (lambda: (1, 2), "returned 2 values"),
        (lambda: (parts()[1], parts()[1], batches), "model=...\\): expected a torch Module, got a SGD"),
        (lambda: (*parts(), iter([1])), "an iterator can be run through once only"),
        (lambda: (*parts(), 3), "batches=...\\): expected a function of the seed"),
        (lambda: (*parts(), batches, 3), "loss=...\\): expected a function"),
    ],
)
def test_what_is_no_task_is_said(make, words):
    with pytest.raises(TypeError, match=words):
        understood(make())


def test_a_loss_of_many_values_is_an_error():
    model, optimizer = parts()
    task = Task(model, optimizer, batches, lambda model, batch: model(batch[0]))
    with pytest.raises(TypeError, match=r"returned a tensor of shape \(4, 2\): expected a tensor of one value"):
        task.compute_loss(model, next(batches(0)))


def test_ranks_share_every_tensor_of_a_batch():
    batch = {"ids": torch.arange(8).view(4, 2), "labels": [torch.arange(4)], "name": "x"}
    first, second = share(batch, 0, 2), share(batch, 1, 2)
    assert torch.equal(torch.cat([first["ids"], second["ids"]]), batch["ids"]) and second["name"] == "x"
    assert second["labels"][0].tolist() == [2, 3]
    with pytest.raises(ValueError, match=r"3 processes cannot share a batch with a tensor of shape \(4, 2\)"):
        share(batch, 0, 3)


def test_the_template_is_a_task_that_learns():
    torch.manual_seed(0)
    task = task_template.make()
    before = task.held_out(task.model)
    for batch in islice(task.stream(0), 60):
        task.optimizer.zero_grad()
        task.compute_loss(task.model, batch).backward()
        task.optimizer.step()
    assert task.held_out(task.model) < before / 2


def test_importing_the_package_imports_no_torch():
    code = "import precision_lab, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.parametrize(
    ("value", "what"), [(torch.ones(3), r"a tensor of shape \(3,\)"), (None, "None"), ("low", "an object of type str")]
)
def test_an_evaluation_is_one_number(value, what):
    task = Task(nn.Linear(1, 1), torch.optim.SGD(nn.Linear(1, 1).parameters()), [1], lambda m, b: b, lambda m: value)
    with pytest.raises(TypeError, match=rf"evaluate\(model\) returned {what}: expected one number"):
        task.held_out(task.model)
