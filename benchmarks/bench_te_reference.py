"""How slow precision-te's reference is: its linear layers beside torch's under bf16 autocast, forward and backward.

The reference computes what FP8 hardware would, to see whether a model trains in it; it is not made for speed. Prints
the factor for each recipe, and that of a step of the small GPT. No target.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from _measure import interleave, print_table
from torch import Tensor, nn

from precision_core import Fabric
from precision_lab.gpt import BYTES, GPT, GPTConfig
from precision_te.recipes import RECIPES, recipe_from
from precision_te.reference import ReferenceEngine, ReferenceLinear

MODES = ("fp8-reference", "fp8-current-reference", "mxfp8-reference", "nvfp4-reference")


def main() -> None:
    parser = argparse.ArgumentParser(description="precision-te's reference beside bf16-mixed.")
    parser.add_argument("--rounds", type=int, default=20)
    options, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    for width, tokens in ((160, 512), (512, 512), (2048, 512)):
        rows = [
            row(name, layer_step(width, tokens, name), layer_step(width, tokens, None), options.rounds)
            for name in RECIPES
        ]
        print_table(f"one layer {width} x {width}, {tokens} tokens", HEAD, rows)
    rows = [row(mode, gpt_step(mode), gpt_step("bf16-mixed"), options.rounds) for mode in MODES]
    print_table("a step of the small GPT, 4 x 128 tokens", HEAD, rows)


HEAD = ["recipe", "reference ms", "bf16 ms", "factor", "quartiles"]


def row(name: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> list[str]:
    """Returns a line of the table."""
    ours(), theirs()
    times = interleave(ours, theirs, rounds, 1)
    return [
        name,
        f"{times.ours * 1e3:.1f}",
        f"{times.theirs * 1e3:.1f}",
        f"{times.ratio:.1f}",
        f"{times.low:.1f} to {times.high:.1f}",
    ]


def layer_step(width: int, tokens: int, recipe: str | None) -> Callable[[], object]:
    """Returns forward and backward of a layer under bf16 autocast; `recipe` None is torch's."""
    layer: Any = nn.Linear(width, width)
    x = torch.randn(tokens, width, requires_grad=True)
    if recipe is not None:
        layer = ReferenceLinear(layer.weight, layer.bias)

    def products() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    def step() -> None:
        if recipe is None:
            y = products()
        else:
            with ReferenceEngine().context(recipe_from(recipe)):
                y = products()
        y.backward(torch.ones_like(y))

    return step


def gpt_step(mode: str) -> Callable[[], object]:
    """Returns a training step of the small GPT."""
    fabric = Fabric(accelerator="cpu", precision=mode)
    fabric.seed_everything(0)
    model = GPT(GPTConfig())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    fabric.setup(model, optimizer)
    ids = torch.randint(BYTES, (4, 129))

    def step() -> None:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        fabric.backward(loss)
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
