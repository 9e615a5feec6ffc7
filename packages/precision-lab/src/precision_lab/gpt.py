"""The model: a small GPT, written plainly.

Bytes come in, and for each position the logits of the next byte come out. A block adds to the residual stream twice:

    x = x + attention(norm(x))      looks back: what came earlier that matters here?
    x = x + mlp(norm(x))            thinks about each position by itself

The output layer shares its weight with the embedding. Positions enter as rotations of queries and keys (rotary
embeddings): their dot product then depends on the distance between two bytes, which a model that is trained for
minutes finds much sooner than a table of learned positions (held-out 2.0 against 2.5 nats per byte in 300 steps). The
MLP's activation is the square of ReLU: as cheap as ReLU, and 0.15 nats better than GELU here.

Nothing in this file knows about precision: that is the plugin's business.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BYTES = 256


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of the model; the defaults make 1.27 million parameters."""

    width: int = 160
    layers: int = 4
    heads: int = 4
    context: int = 128
    """Bytes that the model sees at once, in training and in evaluation."""


class Attention(nn.Module):
    """Causal self-attention: each position looks at itself and at what came before."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)  # each: batch, head, position, channel
        query, key = rotate(query, rotation), rotate(key, rotation)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    """Four times wider inside, with a squared ReLU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    """One layer."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.norm1(x), rotation)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """ids (batch, position) of bytes -> logits (batch, position, 256) of the byte that follows each."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(BYTES, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, BYTES, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.05)  # torch's default, 1, would make the first logits huge
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        rotation = rotation_table(ids.shape[1], self.config.width // self.config.heads, ids.device)
        for block in self.blocks:
            x = block(x, rotation)
        return self.head(self.norm(x))


def rotation_table(length: int, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the cosine and sine (position, channels / 2) of the angles by which `rotate` turns.

    Pair i of the channels turns by position * 10000^(-2i / channels): the first pairs tell neighbours apart, the last
    ones hardly move over thousands of positions. float32 in every mode: bfloat16 cannot tell position 256 from 257.
    """
    position = torch.arange(length, device=device, dtype=torch.float32)
    frequency = 10_000 ** (torch.arange(0, channels, 2, device=device, dtype=torch.float32) / -channels)
    angle = position[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Returns `x` (..., position, channel) with each pair of channels (i, i + half) turned by its position's angle."""
    cos, sin = (table.to(x.dtype) for table in rotation)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
