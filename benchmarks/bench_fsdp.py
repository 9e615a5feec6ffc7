"""FSDP through Fabric on two CPU ranks: the time of a step beside a hand-written loop, memory beside DDP.

Steps: both loops run in the same two processes, step by step in turn, in the same order on both ranks; wall time, since
ranks wait for each other. The hand-written one calls `fully_shard` with the same groups and policies, under the same
autocast, and has norms that compute in float32 as ours do. Shown is the median of the ratios pair by pair on rank zero,
over the quieter half of the pairs.

Memory: bytes of live tensors on one rank, for a transformer of 50 million parameters with AdamW. `states` are
parameters, gradients and optimizer state after a step; `peak` is the largest sum in the third step, activations and
gathered parameters included.

Targets: a step takes at most 1.02 times the hand-written loop's, and states take at most 1.05 times their whole size
over the number of ranks, plus one block.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from _measure import Step, interleave, print_table, verdict
from bench_memory import peak_of
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import layer_norm, mse_loss
from torch.optim import AdamW

from precision_core import MODES, DDPStrategy, Fabric, Strategy
from precision_fsdp import FSDPStrategy

WIDTH, BATCH, BLOCKS = 256, 64, 4
LARGE, LARGE_BLOCKS, VOCABULARY, TOKENS = 704, 8, 2048, 8  # 50.5 million parameters
TIME_TARGET, STATES_TARGET = 1.02, 1.05
MIB = 2**20


class Block(nn.Module):
    """A perceptron behind a LayerNorm, added to the stream."""

    def __init__(self, width: int, norm: type[nn.LayerNorm] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class WideNorm(nn.LayerNorm):
    """Computes in float32 with weights that FSDP has gathered in bfloat16, which torch's own refuses on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class Net(nn.Module):
    """A stack of blocks over floats."""

    def __init__(self, norm: type[nn.LayerNorm] = nn.LayerNorm) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(WIDTH, norm) for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def main() -> None:
    options = argparse.ArgumentParser(description="FSDP: step beside the hand-written loop, memory beside DDP.")
    options.add_argument("--rounds", type=int, default=60, help="pairs of steps in each row")
    options.add_argument("--steps", type=int, default=1, help="steps in a block")
    given, _ = options.parse_known_args()  # other benchmarks may be run with the same arguments
    Fabric(accelerator="cpu", devices=2).launch()
    torch.set_num_threads(1)
    rows = []
    for mode in ("32-true", "bf16-mixed", "bf16-true"):
        ours, theirs = fabric_loop(mode), hand_loop(mode)
        for _ in range(10):
            ours()
            theirs()
        result = interleave(ours, theirs, given.rounds, given.steps, clock=time.perf_counter)
        cells = [f"{result.ours * 1e6:.0f}", f"{result.theirs * 1e6:.0f}", f"{result.ratio:.3f}"]
        rows.append([mode, *cells, f"{result.low:.3f} to {result.high:.3f}", verdict(result.ratio, TIME_TARGET)])
    show("FSDP step, two ranks", ["mode", "us a step", "by hand", "ratio", "quartiles", "target"], rows)
    head = ["mode", "states", "at most", "DDP's states", "peak", "DDP's peak", "target"]
    show("MiB a rank, two ranks", head, [memory(mode) for mode in MODES])


def show(title: str, head: list[str], rows: list[list[str]]) -> None:
    """Prints a table, on rank zero."""
    if torch.distributed.get_rank() == 0:
        print_table(title, head, rows)


# ---------------------------------------------------------------- time


def start(norm: type[nn.LayerNorm] = nn.LayerNorm) -> tuple[Net, Tensor, Tensor]:
    """Returns a model and this rank's batch; the same ones at each call."""
    torch.manual_seed(torch.distributed.get_rank())
    inputs, targets = torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH)
    torch.manual_seed(0)
    return Net(norm), inputs, targets


def fabric_loop(mode: str) -> Step:
    """Returns a step through Fabric."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy=FSDPStrategy(), precision=mode)
    model, inputs, targets = start()
    optimizer = AdamW(model.parameters(), lr=1e-4)
    fabric.setup(model, optimizer)

    def step() -> None:
        optimizer.zero_grad()
        fabric.backward(mse_loss(model(inputs), targets))
        optimizer.step()

    return step


def hand_loop(mode: str) -> Step:
    """Returns a step in plain PyTorch."""
    policy = MODES[mode]
    model, inputs, targets = start(WideNorm if policy.mixed else nn.LayerNorm)
    model.to(policy.params)
    sharding = MixedPrecisionPolicy(policy.compute, policy.reduce, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mp_policy=sharding)
    fully_shard(model, mp_policy=sharding, reshard_after_forward=True)
    optimizer = AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", policy.compute) if policy.mixed else nullcontext():
            output = model(inputs.to(policy.params))
        mse_loss(output.float(), targets).backward()
        optimizer.step()

    return step


# ---------------------------------------------------------------- memory


class Large(nn.Module):
    """A transformer's parameters: 50 million of them, most in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, LARGE)
        self.blocks = nn.ModuleList(LargeBlock() for _ in range(LARGE_BLOCKS))
        self.head = nn.Linear(LARGE, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class LargeBlock(nn.Module):
    """Attention and a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(LARGE)
        self.qkv, self.projection = nn.Linear(LARGE, 3 * LARGE), nn.Linear(LARGE, LARGE)
        self.perceptron = Block(LARGE)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).unsqueeze(0).chunk(3, dim=-1)
        attended = nn.functional.scaled_dot_product_attention(query, key, value).squeeze(0)
        return self.perceptron(x + self.projection(attended))


def memory(mode: str) -> list[str]:
    """Returns the row of a mode."""
    states, peak, block = measured(FSDPStrategy(), mode)
    whole, whole_peak, _ = measured(DDPStrategy(), mode)
    bound = STATES_TARGET * whole / torch.distributed.get_world_size() + block
    cells = [f"{each / MIB:.0f}" for each in (states, bound, whole, peak, whole_peak)]
    return [mode, *cells, verdict(states / bound, 1.0)]


def measured(strategy: Strategy, mode: str) -> tuple[int, int, int]:
    """Returns the bytes of states after a step, of the peak in the third step, and of one whole block."""
    held: dict[str, int] = {}

    def prepare() -> Callable[[], object]:
        fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, precision=mode)
        model = Large()
        held["block"] = sum(param.numel() for param in model.blocks[0].parameters()) * MODES[mode].params.itemsize
        optimizer = AdamW(model.parameters(), lr=1e-4)
        fabric.setup(model, optimizer)
        ids = torch.arange(TOKENS)

        def step() -> None:
            optimizer.zero_grad()
            fabric.backward(model(ids).pow(2).mean() * 1e-6)
            optimizer.step()

        step()
        tensors: list[Any] = [*model.parameters(), *(param.grad for param in model.parameters())]
        tensors += [value for state in optimizer.state.values() for value in state.values()]
        held["states"] = sum(getattr(each, "_local_tensor", each).nbytes for each in tensors if each is not None)
        step()
        return step

    _, peak = peak_of(prepare)
    return held["states"], peak, held["block"]


if __name__ == "__main__":
    main()
