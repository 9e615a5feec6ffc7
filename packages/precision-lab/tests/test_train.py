import json
import math

import pytest
import torch

import precision_lab.train as train_module
from precision_lab.gpt import GPT, GPTConfig
from precision_lab.text import split_text
from precision_lab.train import BATCH, LEARNING_RATE, Job, draw_batch, evaluate, learning_rate, settings, train


def test_first_losses_are_those_of_a_plain_loop(monkeypatch):
    """Without Fabric and its plugins: the same seed, weights, batches, optimizer and clipping, by hand."""
    training, held_out = split_text()
    monkeypatch.setattr(train_module, "split_text", lambda: (training, held_out[:1000]))  # that part is tested below
    events = list(train(Job("32-true", steps=2, seed=5, accelerator="cpu")))
    torch.manual_seed(5)
    model = GPT(GPTConfig())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0, betas=(0.9, 0.99), eps=1e-5, weight_decay=0.1, fused=True)
    generator = torch.Generator().manual_seed(5)
    expected = []
    for _ in range(2):
        inputs, targets = draw_batch(training, 128, generator)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE  # two steps are too few to rise or fall
        loss = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        expected.append(loss.item())
    assert [event["loss"] for event in events if "loss" in event] == pytest.approx(expected, rel=1e-6)

    start, (end,) = events[0], [event for event in events if "held_out_loss" in event]
    size = sum(param.numel() for param in model.parameters())
    assert start["parameters"] == size
    assert end["parameter_bytes"] == end["gradient_bytes"] == 4 * size
    tensors = len(list(model.parameters()))
    assert end["optimizer_bytes"] == 2 * 4 * size + 4 * tensors  # two averages, and a step count per tensor
    assert end["skipped_steps"] == 0
    assert json.loads(json.dumps(events)) == events


def test_held_out_loss_against_a_direct_computation():
    torch.manual_seed(0)
    config = GPTConfig(width=32, layers=1, heads=2, context=16)
    model = GPT(config).double()
    data = torch.randint(256, (1000,))
    total, count = 0.0, 0
    for start in range(0, 1000, 16):
        window = data[start : start + 17].tolist()
        if len(window) < 17:
            break
        logits = model(torch.tensor([window[:-1]]))[0]
        for row, target in zip(logits.tolist(), window[1:], strict=True):
            total += math.log(sum(math.exp(value) for value in row)) - row[target]
            count += 1
    assert count == 992
    assert evaluate(model, data, 16) == pytest.approx(total / count, rel=1e-10)


def test_batches_are_windows_of_the_text_and_the_same_for_a_seed():
    data = torch.arange(1000)
    inputs, targets = draw_batch(data, 16, torch.Generator().manual_seed(1))
    assert inputs.shape == targets.shape == (BATCH, 16)
    assert torch.equal(inputs + 1, targets)
    assert torch.equal(inputs - inputs[:, :1], torch.arange(16).expand(BATCH, 16))
    assert torch.equal(inputs, draw_batch(data, 16, torch.Generator().manual_seed(1))[0])
    assert not torch.equal(inputs, draw_batch(data, 16, torch.Generator().manual_seed(2))[0])


def test_every_window_can_be_drawn():
    generator = torch.Generator().manual_seed(0)
    starts = {int(start) for _ in range(50) for start in draw_batch(torch.arange(20), 16, generator)[0][:, 0]}
    assert starts == {0, 1, 2, 3}  # the last one's last target is the last byte


def test_learning_rate_rises_and_falls():
    rates = [learning_rate(step, 300) / LEARNING_RATE for step in range(300)]
    assert rates[0] == pytest.approx(1 / 30)
    assert rates[29] == rates[30] == 1
    assert rates[165] == pytest.approx(0.5)
    assert rates[299] == pytest.approx(1 / 270)
    assert [learning_rate(step, 1) for step in range(1)] == [LEARNING_RATE]


def test_a_loss_that_is_not_finite_is_an_error(monkeypatch):
    monkeypatch.setattr(train_module, "learning_rate", lambda step, steps: 1e30)
    with pytest.raises(FloatingPointError, match=r"the training loss is (nan|inf) at step"):
        list(train(Job("32-true", steps=5, seed=0, accelerator="cpu")))


def test_settings_are_plain_values():
    assert json.loads(json.dumps(settings())) == settings()
