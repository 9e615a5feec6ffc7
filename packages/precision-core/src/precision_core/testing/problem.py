"""A small training problem, the same in every process, and the loop that trains it: curves for `loss_bound`.

A causal transformer of two blocks (28,000 parameters) learns to predict the next token of a seeded Markov chain. It has
what rounding acts on in real training: embeddings, LayerNorm, attention, GELU, a residual stream, a softmax. Widths are
multiples of 32 and a row has 16 tokens, which suits quantised and FP8 layers too.

One learning rate serves all modes. It is small enough that bf16-true loses updates which bf16-mixed keeps, so that
their curves part within 100 steps, and that float16 and bfloat16 compute stay apart by more than the noise of either,
which grows faster with the learning rate than their difference does.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.optim import SGD, AdamW, Optimizer

from precision_core.fabric import Fabric

VOCABULARY, LENGTH, WIDTH, HEADS, BLOCKS = 32, 16, 32, 2, 2
ROWS = 24
"""Sequences in a global batch: a multiple of 2, 3, 4, 6, 8 and 12."""
BATCHES = 4
"""Batches in the data set; step n trains on batch n modulo this."""
SUCCESSORS = 4  # of each token, so a model that has learned the chain is at a loss of log(4) = 1.39

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


class Block(nn.Module):
    """Attention and a perceptron, each behind a LayerNorm and added to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.projection = nn.Linear(WIDTH, WIDTH)
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Takes and returns the residual stream, (rows, length, width)."""
        rows, length, _ = x.shape
        query, key, value = self.qkv(self.attention_norm(x)).view(rows, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).reshape(rows, length, WIDTH))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Tokens (rows, length), int64 -> logits (rows * length, vocabulary)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the logits of each next token."""
        positions = self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        x = self.blocks(self.embedding(tokens) + positions)
        return self.head(self.norm(x).flatten(0, 1))  # of a three-dimensional x it is a view, of which FSDP2 warns


@dataclass(frozen=True)
class Problem:
    """Weights, data and rounding by seed. Nothing else can be chosen: `loss_bound` holds for this problem alone."""

    seed: int = 0

    def model(self) -> nn.Module:
        """Returns a new model in float32 on the CPU, the same weights each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return Transformer()

    def batch(self, step: int) -> Tensor:
        """Returns the global batch of a step: tokens (24, 17), int64, on the CPU; the last 16 are the targets."""
        generator = torch.Generator().manual_seed(self.seed)
        successors = torch.randint(VOCABULARY, (VOCABULARY, SUCCESSORS), generator=generator)
        tokens = [torch.randint(VOCABULARY, (ROWS * BATCHES,), generator=generator)]
        for _ in range(LENGTH):
            tokens.append(successors[tokens[-1], torch.randint(SUCCESSORS, (ROWS * BATCHES,), generator=generator)])
        return torch.stack(tokens, dim=1).chunk(BATCHES)[step % BATCHES]

    def loss(self, model: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """Returns the mean cross entropy over the tokens of `rows`, a scalar in float32 or wider."""
        logits = model(rows[:, :-1])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return cross_entropy(logits, rows[:, 1:].flatten())


def sgd(params: Iterable[nn.Parameter], foreach: bool | None = None, fused: bool | None = None) -> Optimizer:
    """Returns SGD with momentum, the optimizer of curves and controls: Adam does not see a factor on gradients."""
    return SGD(params, lr=0.003, momentum=0.9, foreach=foreach, fused=fused)


def adamw(params: Iterable[nn.Parameter]) -> Optimizer:
    """Returns AdamW, for comparisons without controls. Not for 16-true, where its squared gradients underflow."""
    return AdamW(params, lr=2e-4)


def train(
    fabric: Fabric,
    problem: Problem | None = None,
    *,
    steps: int = 100,
    accumulate: int = 1,
    rank: int | None = None,
    world_size: int | None = None,
    optimizer: MakeOptimizer = sgd,
    gradient_factor: float = 1.0,
    after_step: Callable[[nn.Module], object] | None = None,
) -> list[float]:
    """Trains through `fabric` and returns the loss of each step, before its update.

    With several ranks it is the loss of this rank's share of the global batch; `mean_curve` of all ranks' curves is
    the global batch's. `rank` and `world_size` are the fabric's unless given.

    Args:
        accumulate: microbatches in a step, averaged.
        gradient_factor: multiplies the loss that backward sees, not the one returned: a control.
        after_step: called with the model after each step.

    Raises:
        ValueError: the batch of 24 rows does not divide by ranks times microbatches.
    """
    problem = problem or Problem()
    rank = fabric.global_rank if rank is None else rank
    world_size = fabric.world_size if world_size is None else world_size
    if ROWS % (world_size * accumulate):
        raise ValueError(f"{ROWS} rows do not divide into {world_size} ranks with {accumulate} microbatches each")
    model = problem.model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(problem.seed)  # rounding by chance takes its seed at setup
        model, optim = fabric.setup(model, optimizer(model.parameters()))
    batches = [problem.batch(step).chunk(world_size)[rank].to(fabric.device) for step in range(BATCHES)]
    curve = []
    for step in range(steps):
        optim.zero_grad()
        losses = []
        for number, rows in enumerate(batches[step % BATCHES].chunk(accumulate), start=1):
            with fabric.no_backward_sync(model, enabled=number < accumulate):
                loss = problem.loss(model, rows)
                fabric.backward(loss * (gradient_factor / accumulate))
            losses.append(loss.detach())
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", ".* of the updates in a sample changed nothing"
            )  # pure half modes do that
            optim.step()
        if after_step is not None:
            after_step(model)
        curve.append(math.fsum(loss.item() for loss in losses) / accumulate)
    return curve


def mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    """Returns the mean of the ranks' curves at each step."""
    return [math.fsum(losses) / len(curves) for losses in zip(*curves, strict=True)]
