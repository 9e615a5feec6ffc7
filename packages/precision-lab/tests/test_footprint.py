"""The estimate against an outside witness: every allocation and release that torch's profiler records of real steps."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from precision_core import Fabric
from precision_lab import Task
from precision_lab.footprint import KINDS, trace
from precision_lab.gpt import GPT, GPTConfig
from precision_lab.train import cross_entropy


def task(model, optimizer, draw, loss, **more):
    def batches(seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield draw(generator)

    return Task(model, optimizer, batches, loss, **more)


def gpt():
    model = GPT(GPTConfig(48, 2, 4, 64))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    loss = lambda model, x: cross_entropy(model(x[:, :-1]), x[:, 1:])  # noqa: E731
    return task(model, optimizer, lambda g: torch.randint(256, (4, 65), generator=g), loss, clip_norm=1.0)


def images(generator):
    return torch.randn(8, 3, 16, 16, generator=generator), torch.randint(10, (8,), generator=generator)


def conv():
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Conv2d(16, 32, 3), nn.GELU(), nn.Flatten(), nn.Linear(1152, 10))
    return task(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), images, nn.CrossEntropyLoss())


def residual():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.norm = nn.Linear(64, 256), nn.Linear(256, 64), nn.LayerNorm(64)

        def forward(self, x):
            return self.norm(x + self.second(F.silu(self.first(x))))

    model = nn.Sequential(Residual(), Residual(), nn.Linear(64, 10))
    draw = lambda g: (torch.randn(96, 64, generator=g), torch.randint(10, (96,), generator=g))  # noqa: E731
    return task(model, torch.optim.Adam(model.parameters(), foreach=True), draw, nn.CrossEntropyLoss())


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.out = nn.Embedding(500, 64), nn.Linear(64, 500)

    def forward(self, ids):
        return self.out(F.dropout(torch.tanh(self.embedding(ids)).mean(dim=1), 0.2))


def bag():
    model = Bag()
    draw = lambda g: (torch.randint(500, (32, 20), generator=g), torch.randint(500, (32,), generator=g))  # noqa: E731
    return task(model, torch.optim.RMSprop(model.parameters()), draw, nn.CrossEntropyLoss())


class Names(nn.Module):
    def __init__(self):
        super().__init__()
        self.letters, self.norm = nn.Embedding(30, 16), nn.BatchNorm1d(200)
        self.hidden, self.out = nn.Linear(128, 200, bias=False), nn.Linear(200, 30)

    def forward(self, ids):
        return self.out(torch.tanh(self.norm(self.hidden(self.letters(ids).flatten(1)))))


def names():
    model = Names()
    draw = lambda g: (torch.randint(30, (64, 8), generator=g), torch.randint(30, (64,), generator=g))  # noqa: E731
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    return task(model, optimizer, draw, nn.CrossEntropyLoss())


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(50, 32), nn.LSTM(32, 64, 2, batch_first=True)
        self.out = nn.Linear(64, 50)

    def forward(self, ids):
        return self.out(self.lstm(self.embedding(ids))[0][:, -1])


def recurrent():
    model = Recurrent()
    draw = lambda g: (torch.randint(50, (16, 20), generator=g), torch.randint(50, (16,), generator=g))  # noqa: E731
    return task(model, torch.optim.Adam(model.parameters()), draw, nn.CrossEntropyLoss())


def autoencoder():
    layers = [nn.Conv2d(3, 16, 4, stride=2, padding=1), nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, stride=2, padding=1)]
    model = nn.Sequential(*layers)
    draw = lambda g: [torch.randn(8, 3, 16, 16, generator=g)] * 2  # noqa: E731
    return task(model, torch.optim.SGD(model.parameters(), lr=0.1), draw, nn.MSELoss())


def witnessed(mode, make):
    """The most bytes that were allocated and not released at once, over set-up and three real steps."""
    fabric = Fabric("cpu", precision=mode)
    gc.collect()  # the profiler also counts what an earlier one saw allocated
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        made = make()
        model, optimizer = fabric.setup(made.model, made.optimizer)
        batches = made.stream(0)
        for _ in range(3):
            optimizer.zero_grad()
            fabric.backward(made.compute_loss(model, next(batches)))
            if made.clip_norm is not None:
                fabric.clip_gradients(model, optimizer, max_norm=made.clip_norm)
            optimizer.step()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize(
    ("mode", "make"),
    [
        *(("32-true", make) for make in (gpt, conv, residual, bag, names)),
        *(("bf16-mixed", make) for make in (gpt, conv, residual, bag, names)),
        ("bf16-mixed", recurrent),
        ("bf16-true", autoencoder),
        *(pytest.param(mode, gpt, marks=pytest.mark.full) for mode in ("bf16-master", "16-master", "bf16-stochastic")),
        *(pytest.param("bf16-true", make, marks=pytest.mark.full) for make in (gpt, conv, residual, bag, names)),
        *(pytest.param("32-true", make, marks=pytest.mark.full) for make in (recurrent, autoencoder)),
    ],
)
def test_the_peak_is_what_a_real_run_allocates(mode, make):
    found = trace(mode, make)
    assert found.peak == pytest.approx(witnessed(mode, make), rel=0.03)
    assert sum(found.of(kind) for kind in KINDS) == found.peak


@pytest.mark.parametrize("mode", ["64-true", "32-true", "16-mixed", "16-true"])
def test_each_kind_is_what_its_dtypes_make_it(mode):
    found, width = trace(mode, gpt), {"64-true": 8, "16-true": 2}.get(mode, 4)
    numbers = sum(param.numel() for param in gpt().model.parameters())
    tensors = len(list(gpt().model.parameters()))
    assert found.params == width * numbers and found.buffers == 0
    assert found.optimizer == {"step": 4 * tensors, "exp_avg": width * numbers, "exp_avg_sq": width * numbers}
    assert found.resident == found.params + found.of("optimizer") + found.master
    assert found.master < 100 and found.activations > found.temporary > 0


@pytest.mark.full
def test_what_is_beside_half_weights_is_a_master_and_no_state_of_the_optimizers():
    numbers = sum(param.numel() for param in residual().model.parameters())
    master, stochastic = trace("bf16-master", residual), trace("bf16-stochastic", residual)
    assert master.params == master.master == stochastic.params == 2 * numbers  # two halves of a float32 number
    assert master.optimizer["exp_avg"] == 2 * stochastic.optimizer["exp_avg"] == 4 * numbers
    assert "master_rest" not in master.optimizer and stochastic.master < 100
    full = trace("16-master", gpt)
    numbers = sum(param.numel() for param in gpt().model.parameters())
    assert full.params == 2 * numbers and 4 * numbers <= full.master < 4 * numbers + 100  # and the loss scale
    assert full.optimizer["exp_avg"] == 4 * numbers and "master_weight" not in full.optimizer


def test_nothing_real_is_allocated_and_nothing_is_left_behind():
    def large():
        model = nn.Linear(100_000, 100_000)  # 40 GB, and as much for its gradient
        return task(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda g: torch.ones(1, 100_000), loss)

    loss = lambda model, x: model(x).mean()  # noqa: E731
    found = trace("32-true", large)
    assert found.params == 4 * (10**10 + 10**5) and found.peak > 2 * found.params
    assert type(torch.ones(2)) is torch.Tensor and torch.ones(2).sum().item() == 2
