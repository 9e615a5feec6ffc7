"""Error of bf16-mixed under FSDP's ways to cast, relative to float64: the README's table of precision-fsdp.

A transformer of six blocks, fresh and after 300 steps of AdamW on a seeded Markov chain. In one process: what FSDP
casts does not depend on how many there are. Prints the relative error of logits and of all gradients together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from _measure import print_table
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from precision_fsdp import FSDPPrecision

WIDTH, HEADS, LENGTH, VOCABULARY, BLOCKS = 128, 4, 64, 256, 6


class Block(nn.Module):
    """Attention and a perceptron, each behind a LayerNorm and added to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.projection = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        query, key, value = self.qkv(self.norm(x)).view(rows, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).reshape(rows, length, WIDTH))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Tokens (rows, length) to logits (rows * length, vocabulary)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).flatten(0, 1))


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(0)
    model = GPT()
    tokens = torch.randint(VOCABULARY, (8, LENGTH + 1))
    fresh = errors(model, tokens)
    trained = errors(model, train(model, 300))
    rows = [[name, *(f"{error:.4f}" for error in (*fresh[name], *trained[name]))] for name in fresh]
    print_table("error to float64", ["", "logits", "gradients", "trained: logits", "gradients"], rows)


def train(model: nn.Module, steps: int) -> Tensor:
    """Trains in float32; returns the last batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(1)
    successors = torch.randint(VOCABULARY, (VOCABULARY, 4), generator=generator)
    for _ in range(steps):
        chain = [torch.randint(VOCABULARY, (16,), generator=generator)]
        for _ in range(LENGTH):
            chain.append(successors[chain[-1], torch.randint(4, (16,), generator=generator)])
        tokens = torch.stack(chain, 1)
        optimizer.zero_grad()
        cross_entropy(model(tokens[:, :-1]), tokens[:, 1:].flatten()).backward()
        optimizer.step()
    return tokens


def errors(model: nn.Module, tokens: Tensor) -> dict[str, tuple[float, float]]:
    """Returns the errors of logits and of gradients for each way to run the model."""
    exact, exact_gradients = run(copy.deepcopy(model).double(), tokens, nullcontext)
    size = torch.stack([each.norm() for each in exact_gradients]).norm()
    found = {}
    for name, make in WAYS.items():
        logits, gradients = run(*make(copy.deepcopy(model), tokens))
        off = [(mine - true).norm() for mine, true in zip(gradients, exact_gradients, strict=True)]
        found[name] = (((logits - exact).norm() / exact.norm()).item(), (torch.stack(off).norm() / size).item())
    return found


def run(
    model: nn.Module, tokens: Tensor, context: Callable[[], AbstractContextManager[Any]]
) -> tuple[Tensor, list[Tensor]]:
    """Returns logits and gradients, in float64."""
    model.zero_grad()
    with context():
        logits = model(tokens[:, :-1])
    wide = logits if logits.dtype is torch.float64 else logits.float()
    cross_entropy(wide, tokens[:, 1:].flatten()).backward()
    gradients: list[Any] = [param.grad for param in model.parameters()]
    return logits.detach().double(), [getattr(each, "_local_tensor", each).double() for each in gradients]


def autocast() -> AbstractContextManager[Any]:
    """Returns what bf16-mixed runs under."""
    return torch.autocast("cpu", torch.bfloat16)


def shard(model: Any, policy: MixedPrecisionPolicy) -> Any:
    """Returns the model with a group for each block and the root."""
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def fsdps_casts(model: GPT, tokens: Tensor) -> Any:
    """FSDP's own casts of parameters and inputs."""
    return shard(model, MixedPrecisionPolicy(torch.bfloat16, torch.float32)), tokens, nullcontext


def float32_norms(model: GPT, tokens: Tensor) -> Any:
    """As those, under autocast, with norms in float32 and embeddings as they are gathered."""
    embeddings = [model.embedding, model.positions]
    plugin = FSDPPrecision("bf16-mixed")
    plugin.convert_module(model)
    for each in embeddings:
        del vars(each)["forward"]
    return shard(model, plugin.setup_mixed_precision_policy()), tokens, autocast


def ours(model: GPT, tokens: Tensor) -> Any:
    """FSDPPrecision("bf16-mixed")."""
    plugin = FSDPPrecision("bf16-mixed")
    return shard(plugin.convert_module(model), plugin.setup_mixed_precision_policy()), tokens, plugin.forward_context


def exact_norms(model: GPT, tokens: Tensor) -> Any:
    """The same, with norms gathered in float32."""
    plugin = FSDPPrecision("bf16-mixed; *norm: 32-true")
    plugin.convert_module(model)
    for block in model.blocks:
        fully_shard([block.norm, block.mlp_norm])
    fully_shard(model.norm)
    return shard(model, plugin.setup_mixed_precision_policy()), tokens, plugin.forward_context


def plain_autocast(model: GPT, tokens: Tensor) -> Any:
    """Autocast over float32 parameters."""
    return model, tokens, autocast


WAYS: dict[str, Callable[[GPT, Tensor], Any]] = {
    "FSDP's casts": fsdps_casts,
    "and norms in float32": float32_norms,
    "bf16-mixed": ours,
    "bf16-mixed; *norm: 32-true": exact_norms,
    "autocast, float32 parameters": plain_autocast,
}


if __name__ == "__main__":
    main()
