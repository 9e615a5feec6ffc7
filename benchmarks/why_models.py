"""Three small models with ten places each at which bench_why.py injects faults, one operation a line."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

PLACES = 10
WIDTH = 16
NARROW_END, WIDE_END = 6e4, 1e38


class Place(nn.Module):
    """A layer, and the fault that is switched on at it; `end` is near the end of the mode's format."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.fault = ""
        self.end = NARROW_END

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return getattr(self, self.fault)(x) if self.fault else x

    def logits(self, x: Tensor) -> Tensor:
        big = x * self.end**0.5
        scores = big @ big.transpose(-1, -2)  # logits
        return torch.softmax(scores, -1) @ x

    def masked_row(self, x: Tensor) -> Tensor:
        scores = x @ x.transpose(-1, -2)
        hidden = torch.zeros_like(scores, dtype=torch.bool)
        hidden[..., 0, :] = True
        weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)  # masked_row
        return weights @ x

    def squares(self, x: Tensor) -> Tensor:
        big = x * self.end**0.5
        total = (big**2).sum(-1, keepdim=True)  # squares
        return big / torch.sqrt(total + 1e-3)

    def squash(self, x: Tensor) -> Tensor:
        big = x * self.end**0.5
        total = (big * big).sum(-1, keepdim=True)  # squash
        return total / (1 + total) * x

    def exp(self, x: Tensor) -> Tensor:
        sharp = x * (20 if self.end < 1e6 else 200)
        return torch.exp(sharp)  # exp

    def log(self, x: Tensor) -> Tensor:
        positive = torch.relu(x)
        return torch.log(positive)  # log

    def division(self, x: Tensor) -> Tensor:
        positive = torch.relu(x)
        return x / positive  # division

    def root(self, x: Tensor) -> Tensor:
        squared = (x - x[..., :1]) ** 2
        return torch.sqrt(squared)  # root

    def backward_overflow(self, x: Tensor) -> Tensor:
        small = x * (1 / self.end)  # backward_overflow
        return small * self.end  # backward_overflow

    def underflow(self, x: Tensor) -> Tensor:
        fixed = x.detach()
        return fixed + (x - fixed) * 1e-8  # underflow


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places = nn.ModuleList(Place(WIDTH) for _ in range(PLACES))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(PLACES))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for place, norm in zip(self.places, self.norms, strict=True):
            x = norm(place(x))
        return self.head(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out, self.down = Place(WIDTH), Place(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out(functional.scaled_dot_product_attention(query, key, value, is_causal=True))
        return x + self.down(functional.gelu(self.norm2(x)))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(PLACES // 2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.into(x)
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(self.norm(x)).mean(1)}


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU(), Place(8))
            for _ in range(PLACES)
        )
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = x + stage(x)
        return self.head(x.mean((-1, -2)))


def batch_for(model: nn.Module) -> Tensor:
    """Returns a batch that the model takes."""
    shape = {MLP: (8, WIDTH), Transformer: (4, 6, WIDTH), Conv: (4, WIDTH, 8, 8)}[type(model)]
    return torch.randn(shape)
