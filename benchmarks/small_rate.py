"""The GPT of `precision compare` at a learning rate of 1e-4, where bfloat16 parameters lose most updates.

    precision compare benchmarks/small_rate.py:make --modes 32-true,bf16-true,bf16-master,bf16-stochastic --seeds 5

AdamW moves a weight by about the learning rate, and the spacing of these weights is 1e-4 to 5e-4. Long runs come to
such rates at their end, fine-tuning starts there.
"""

from __future__ import annotations

import torch

from precision_lab import train as lab
from precision_lab.task import Task

RATE = 1e-4


def make() -> Task:
    """Returns the built-in task, and nothing changed but the rate."""
    task = lab.gpt_maker(torch.device("cpu"))()
    for group in task.optimizer.param_groups:
        group["lr"] = RATE
    return task
