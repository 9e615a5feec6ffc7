"""The small model that the contracts train: everything that conversions may get wrong, in few parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, WIDTH, LENGTH = 32, 32, 8


class Block(nn.Module):
    """Normalises, widens, narrows, and adds to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Dict of ids (batch, position), shift (batch, 1, WIDTH) floats, keep (batch, position) bools -> logits.

    The head is tied to the embedding, `decay` is a buffer of floats, `offsets` one of integers, `frozen` a parameter
    that does not train, `custom` an attribute. `seen` holds the batch of the last forward.
    """

    decay: Tensor
    offsets: Tensor

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(VOCABULARY, WIDTH)
            self.blocks = nn.ModuleList(Block() for _ in range(2))
            self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
            self.frozen = nn.Parameter(torch.randn(WIDTH), requires_grad=False)
            nn.init.normal_(self.embedding.weight, std=0.1)
        self.head.weight = self.embedding.weight
        self.register_buffer("decay", torch.full((WIDTH,), 0.5))
        self.register_buffer("offsets", torch.arange(LENGTH))
        self.custom = {"kept": True}
        self.seen: dict[str, Any] = {}

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        self.seen = dict(batch)
        x = self.embedding(batch["ids"]) + batch["shift"] * self.decay + self.frozen
        for block in self.blocks:
            x = block(x)
        return self.head(x * batch["keep"].unsqueeze(-1))


def make_batch(step: int, size: int = 8, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], Tensor]:
    """Returns (batch, target ids) of a step: the target of each id is the next id. Floats are float32, ids int64."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(0, VOCABULARY, (size, LENGTH), generator=generator)
    batch = {
        "ids": ids,
        "shift": torch.randn(size, 1, WIDTH, generator=generator) * 0.1,
        "keep": torch.rand(size, LENGTH, generator=generator) < 0.9,
    }
    return {key: value.to(device) for key, value in batch.items()}, ((ids + 1) % VOCABULARY).to(device)


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    """Returns the mean cross entropy of logits (..., VOCABULARY) and target ids (...), a scalar."""
    return nn.functional.cross_entropy(logits.flatten(0, -2), target.flatten())
