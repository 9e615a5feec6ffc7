"""The small GPT on real text in each recipe of precision-te's reference, beside bf16-mixed and float64.

    python benchmarks/compare_te_recipes.py --steps 150

Everything but the precision is that of `precision compare`: the same weights, batches and learning rates. Prints how
many linear layers were converted, the mean loss of the last 20 steps and that on held-out text, in nats per byte.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from _measure import print_table

from precision_core import Fabric
from precision_lab import train as lab
from precision_lab.gpt import GPT, GPTConfig
from precision_lab.text import split_text
from precision_te import NVFP4, TransformerEnginePrecision
from precision_te.recipes import RECIPES


def plugins() -> dict[str, Any]:
    """Returns what is compared, by name."""
    recipes: dict[str, Any] = {name: name for name in RECIPES}
    recipes["nvfp4, rounded to nearest"] = NVFP4(disable_stochastic_rounding=True)
    found: dict[str, Any] = {"64-true": "64-true", "bf16-mixed": "bf16-mixed"}
    for name, recipe in recipes.items():
        found[name] = TransformerEnginePrecision("bf16-mixed", recipe=recipe, engine="reference")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="The small GPT in each recipe.")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, precision in plugins().items():
        if not options.only or name in options.only:
            rows.append([name, *run(precision, options.steps, options.seed)])
            print("  ".join(rows[-1]), flush=True)
    head = ["", "layers", "training loss", "held out", "minutes"]
    print_table(f"small GPT, {options.steps} steps, seed {options.seed}", head, rows)


def run(precision: Any, steps: int, seed: int) -> list[str]:
    """Returns layers converted, the loss of the last 20 steps, the held-out loss, and minutes."""
    start = time.perf_counter()
    fabric = Fabric(accelerator="cpu", precision=precision)
    training, held_out = split_text()
    fabric.seed_everything(seed)
    model = GPT(GPTConfig())
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lab.LEARNING_RATE, betas=lab.BETAS, eps=lab.EPSILON, weight_decay=lab.WEIGHT_DECAY
    )
    fabric.setup(model, optimizer)
    batches, losses = torch.Generator().manual_seed(seed), []
    for step in range(steps):
        inputs, targets = lab.draw_batch(training, model.config.context, batches)
        for group in optimizer.param_groups:
            group["lr"] = lab.learning_rate(step, steps)
        optimizer.zero_grad()
        loss = lab.cross_entropy(model(inputs), targets)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=lab.MAX_NORM)
        optimizer.step()
        losses.append(loss.item())
    linear = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    converted = sum(type(layer) is not torch.nn.Linear for layer in linear)
    last = losses[-20:]
    return [
        f"{converted} of {len(linear)}",
        f"{sum(last) / len(last):.4f}",
        f"{lab.evaluate(model, held_out, model.config.context):.4f}",
        f"{(time.perf_counter() - start) / 60:.1f}",
    ]


if __name__ == "__main__":
    main()
