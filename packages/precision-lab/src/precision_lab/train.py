"""One training run in one precision, in a process of its own; and the built-in task: a GPT on real text.

    python -m precision_lab.train bf16-mixed --steps 300 --seed 0

trains through `Fabric` and prints one JSON object a line: what runs where, the policy, then each step's loss and
seconds, then the rest of the figures. `precision compare` reads these lines; by hand they, and the whole traceback of
a mode that fails, are one command away. Deterministic algorithms make a second run the same bit for bit.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precision_lab.gpt import GPT, GPTConfig
from precision_lab.loop import Job, Training, local_shard, optimizer_bytes
from precision_lab.serve import Prepare, exit_with_parent, serve
from precision_lab.task import Task
from precision_lab.taskfile import load_make
from precision_lab.text import split_text

__all__ = ["Job", "Task", "local_shard", "optimizer_bytes", "train"]

BATCH = 4
LEARNING_RATE = 2e-3
WARMUP = 30
"""Steps over which the learning rate rises, a tenth of all at most; it then falls to zero in a straight line."""
BETAS = (0.9, 0.99)
EPSILON = 1e-5
"""AdamW divides by the root of a mean of squared gradients, plus this. torch's 1e-8 is too little for 16-true: squares
below 6e-8 are zero in float16, and a loss is NaN at the third step."""
WEIGHT_DECAY = 0.1
MAX_NORM = 1.0

EVALUATION_BATCH = 32


def train(job: Job, prepare: Prepare | None = None) -> Iterator[dict[str, Any]]:
    """Trains, and yields figures as plain values at the start, after each step, and at the end.

    Raises:
        FloatingPointError: the loss is not finite.
        TaskError: the user's file raised before the training.
    """
    training = Training(job, prepare or preparing(job))
    yield from training.start()
    yield from training.advance(job.steps)
    yield from training.finish()


def preparing(job: Job) -> Prepare:
    """Returns what gives `Training` the job's task: the user's file, or the built-in GPT."""
    return (lambda device: load_make(job.task)) if job.task else (lambda device: gpt_maker(device, job.size))


SIZES = {
    "1m": lambda: GPTConfig(),
    "25m": lambda: GPTConfig(512, 8, 8, 512),
    "85m": lambda: GPTConfig(768, 12, 12, 512),
    "300m": lambda: GPTConfig(1024, 24, 16, 512),
    "1b": lambda: GPTConfig(2048, 20, 16, 512),
}
"""Parameters -> the GPT's sizes. On a GPU the smallest measures launches of kernels, not formats."""


def gpt_maker(device: torch.device, size: str = "1m") -> Callable[[], Task]:
    """Returns a function that makes the task of the GPT; the text is read, and on the device, before."""
    training, held_out = (part.to(device) for part in split_text())

    def make() -> Task:
        model = GPT(SIZES[size]())
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY, fused=True
        )
        context = model.config.context

        def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
            generator = torch.Generator().manual_seed(seed)
            while True:
                yield draw_batch(training, context, generator)

        return Task(
            model,
            optimizer,
            batches,
            lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
            lambda model: evaluate(model, held_out, context),
            clip_norm=MAX_NORM,
            schedule=lambda step, steps: learning_rate(step, steps) / LEARNING_RATE,
        )

    return make


def draw_batch(data: Tensor, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns inputs and targets (batch, context): random windows of the text, and the same one byte later."""
    starts = torch.randint(len(data) - context, (BATCH, 1), generator=generator).to(data.device)
    windows = data[starts + torch.arange(context + 1, device=data.device)]
    return windows[:, :-1], windows[:, 1:]


def learning_rate(step: int, steps: int) -> float:
    """Returns the rate of a step, counted from 0: up over the first steps (a tenth at most), then down to zero."""
    warmup = max(1, min(WARMUP, steps // 10))
    return LEARNING_RATE * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup), 1.0)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean loss in nats per byte."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def evaluate(model: nn.Module, data: Tensor, context: int) -> float:
    """Returns the mean loss over `data`, cut into windows side by side; a last one that is not full is left out."""
    count = (len(data) - 1) // context
    inputs = data[: count * context].view(count, context)
    targets = data[1 : count * context + 1].view(count, context)
    total = 0.0
    with torch.no_grad():
        for some_inputs, some_targets in zip(
            inputs.split(EVALUATION_BATCH), targets.split(EVALUATION_BATCH), strict=True
        ):
            total += cross_entropy(model(some_inputs), some_targets).item() * len(some_inputs)
    return total / count


def settings() -> dict[str, Any]:
    """Returns the constants of this file and the model's sizes, for compare.json."""
    return {
        "model": asdict(GPTConfig()),
        "batch": BATCH,
        "optimizer": "AdamW",
        "learning_rate": LEARNING_RATE,
        "warmup": WARMUP,
        "betas": list(BETAS),
        "epsilon": EPSILON,
        "weight_decay": WEIGHT_DECAY,
        "max_norm": MAX_NORM,
    }


def main() -> None:
    """Runs one job from the command line."""
    parser = argparse.ArgumentParser(prog="python -m precision_lab.train", description="Train in one precision.")
    parser.add_argument("mode")
    defaults: dict[str, Any] = {"steps": 300, "seed": 0} | {
        field.name: field.default for field in fields(Job) if field.name not in ("mode", "steps", "seed")
    }
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--until-stdin-closes", action="store_true", help="end with the process at the other end of it")
    parser.add_argument("--told", action="store_true", help="train when lines on stdin say so")
    arguments = vars(parser.parse_args())
    told = 0 if arguments.pop("told") else None
    if arguments.pop("until_stdin_closes"):
        exit_with_parent()

    # Whatever a library prints belongs to stderr: stdout carries our lines only.
    sys.stdout.flush()
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = Job(**arguments)
    serve(job, preparing(job), lines, told)


if __name__ == "__main__":
    main()
