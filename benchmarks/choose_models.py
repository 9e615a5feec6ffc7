"""Eight small models on which `precision choose` is to be right; each function returns a task, as users write them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precision_lab import Task
from precision_lab.task_template import make as nothing_wrong
from precision_lab.text import split_text

MINILM = "MINILM"
"""Environment variable: the folder of all-MiniLM-L6-v2 (config.json, weights, tokenizer)."""


# ---------------------------------------------------------------- images


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns images (n, 1, 8, 8) and labels to train on, then those held out, a third."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16
    y = torch.tensor(labels, dtype=torch.int64)[order]
    return x[:1200], y[:1200], x[1200:], y[1200:]


def classify(model: nn.Module, rate: float, batch: int = 64) -> Task:
    """Returns the task of telling digits apart by `model`."""
    images, labels, held_images, held_labels = digits()

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            some = torch.randint(len(labels), (batch,), generator=generator)
            yield images[some], labels[some]

    def evaluate(model: nn.Module) -> float:
        return F.cross_entropy(model(held_images), held_labels).item()

    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    return Task(model, optimizer, batches, nn.CrossEntropyLoss(), evaluate, schedule=falling)


def falling(step: int, steps: int) -> float:
    """A rate that falls to zero in a straight line."""
    return 1 - step / steps


def conv() -> Task:
    """A convolutional net with batch norm, on scikit-learn's digits."""
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]
    return classify(nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10)), 2e-3)


class ViT(nn.Module):
    """A vision transformer: 16 patches of 2 x 2, and one token that answers."""

    def __init__(self, width: int = 48, layers: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


def vit() -> Task:
    """A vision transformer on the same digits."""
    return classify(ViT(), 2e-3, batch=32)


# ---------------------------------------------------------------- text


class Recurrent(nn.Module):
    """An LSTM over bytes."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, 256)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(ids))[0]).transpose(1, 2)


def lstm() -> Task:
    """An LSTM that predicts the next byte of English text."""
    training, held_out = split_text()
    windows = held_out[: 64 * 129].view(64, 129)

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(training) - 65, (8, 1), generator=generator)
            some = training[starts + torch.arange(65)]
            yield some[:, :-1], some[:, 1:]

    def evaluate(model: nn.Module) -> float:
        return F.cross_entropy(model(windows[:, :-1]), windows[:, 1:]).item()

    model = Recurrent()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    return Task(model, optimizer, batches, nn.CrossEntropyLoss(), evaluate, clip_norm=1.0, schedule=falling)


CHAPTERS = 6


@cache
def chapters(folder: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns windows of 32 tokens of Python's manual, and of which chapter they are; then those held out."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    longest = sorted(topics.values(), key=len, reverse=True)[:CHAPTERS]
    train, held = [], []
    for label, text in enumerate(longest):
        ids = tokenizer(text[:30_000], add_special_tokens=False, verbose=False)["input_ids"]
        windows = torch.tensor(ids[: len(ids) // 30 * 30]).view(-1, 30)
        ends = torch.tensor([[tokenizer.cls_token_id, tokenizer.sep_token_id]]).expand(len(windows), 2)
        windows = torch.cat([ends[:, :1], windows, ends[:, 1:]], dim=1)
        labels = torch.full((len(windows),), label)
        cut = len(windows) * 4 // 5
        train.append((windows[:cut], labels[:cut]))
        held.append((windows[cut:], labels[cut:]))
    x, y = (torch.cat(each) for each in zip(*train, strict=True))
    held_x, held_y = (torch.cat(each) for each in zip(*held, strict=True))
    some = torch.randperm(len(held_y), generator=torch.Generator().manual_seed(0))[:192]
    return x, y, held_x[some], held_y[some]


class Classifier(nn.Module):
    """A pretrained encoder, and a new layer on the mean of its outputs."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, CHAPTERS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(input_ids=ids).last_hidden_state.mean(dim=1))


def minilm() -> Task:
    """MiniLM (22 million parameters) is fine-tuned to tell chapters of a manual apart; its embeddings are frozen."""
    from transformers import AutoModel

    folder = os.environ[MINILM]
    encoder = AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False)
    encoder.embeddings.requires_grad_(False)
    model = Classifier(encoder, encoder.config.hidden_size)
    model.train()
    ids, labels, held_ids, held_labels = chapters(folder)

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            some = torch.randint(len(labels), (8,), generator=generator)
            yield ids[some], labels[some]

    def evaluate(model: nn.Module) -> float:
        return F.cross_entropy(model(held_ids), held_labels).item()

    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-4)
    return Task(model, optimizer, batches, nn.CrossEntropyLoss(), evaluate, clip_norm=1.0, schedule=falling)


# ---------------------------------------------------------------- built to go wrong


class Loud(nn.Module):
    """A block whose inner layer gives values beyond 65,504; the norm behind it makes them small again."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)
        with torch.no_grad():
            self.down.weight.mul_(3e5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.down(F.relu(self.up(x))))


class Quiet(nn.Module):
    """The same without that."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.down(F.relu(self.up(x))))


def regression(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any = falling) -> Task:
    """Returns the task of a smooth function of eight numbers, with noise."""

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, 8, generator=generator)
        y = torch.sin(x[:, :4]).sum(1) + x[:, 4] * x[:, 5]
        return x, (y + 0.3 * torch.randn(count, generator=generator))[:, None]

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield draw(64, generator)

    def evaluate(model: nn.Module) -> float:
        x, y = draw(1024, torch.Generator().manual_seed(10**6))
        return F.mse_loss(model(x), y).item()

    return Task(model, optimizer, batches, nn.MSELoss(), evaluate, schedule=schedule)


def overflow() -> Task:
    """A residual net of which one block overflows float16; the GPU that it is for has no bfloat16."""
    blocks = [Quiet(32), Quiet(32), Loud(32), Quiet(32)]
    model = nn.Sequential(nn.Linear(8, 32), *blocks, nn.Linear(32, 1))
    return regression(model, torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6))


class Wide(nn.Module):
    """A linear layer with weights around one, divided in the forward: its updates are small beside its weights."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.factor = 1 / math.sqrt(inputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * self.factor


def swallowed() -> Task:
    """A net of such layers: bfloat16 is spaced by 1/128 at one, and a step of AdamW is 1/500."""
    model = nn.Sequential(Wide(8, 128), nn.Tanh(), Wide(128, 128), nn.Tanh(), Wide(128, 1))
    return regression(model, torch.optim.AdamW(model.parameters(), lr=2e-3))


MODELS: dict[str, tuple[Callable[[], Any] | None, int, list[str] | None]] = {
    "GPT": (None, 40, None),
    "conv": (conv, 100, None),
    "LSTM": (lstm, 80, None),
    "ViT": (vit, 100, None),
    "MiniLM": (minilm, 16, None),
    "overflow": (overflow, 150, ["32-true", "16-mixed", "16-true"]),
    "swallowed": (swallowed, 150, None),
    "nothing wrong": (nothing_wrong, 150, None),
}
"""Name -> what makes the task (None: the built-in GPT), steps, modes (None: core's)."""


def is_here(name: str) -> bool:
    """Whether the model can be made: one comes from a folder."""
    return name != "MiniLM" or Path(os.environ.get(MINILM, "")).joinpath("config.json").is_file()
