"""What a process of several keeps where its engine cannot be traced: by a formula on what one device was traced to.

`Footprint.how` says so wherever such a figure is shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from precision_core import Policy
from precision_core.support import is_core_mode
from precision_lab.footprint import KINDS, Footprint

REDUCE_BUCKET = 500_000_000
"""Elements of the buffer that DeepSpeed (0.19.8, `reduce_bucket_size`) makes at each backward, whatever the model."""


def sharded(one: Footprint, strategy: str, devices: int) -> Footprint:
    """Returns the footprint of one of `devices` processes, by the strategy's formula on that of a single one.

    Args:
        strategy: one of `FORMULAS`; of another that was traced `one` is returned.
    """
    if strategy not in FORMULAS or one.reason:
        return one
    found = replace(FORMULAS[strategy](one, devices), strategy=strategy, devices=devices)
    return replace(found, peak=sum(found.of(kind) for kind in KINDS), resident=_resident(found))


def _resident(found: Footprint) -> int:
    return sum(found.of(kind) for kind in ("params", "master", "optimizer", "buffers"))


def accelerate_says(numbers: int, mode: str) -> int | None:
    """Returns what `accelerate estimate-memory` says of training a model of so many parameters with Adam.

    Its column is the largest of `estimate_training_usage` (accelerate 1.15.0, commands/estimate.py): in float32 four
    times the float32 parameters (they, their gradients and two moments); in float16 and bfloat16 twice, the moments,
    since it takes these for kept in turn. It has no activations and no strategies. None: it has no such dtype.
    """
    if not is_core_mode(mode):
        return None
    compute = Policy.parse(mode).compute
    return None if compute is torch.float64 else 4 * numbers * (4 if compute is torch.float32 else 2)


def _deepspeed(one: Footprint, devices: int) -> Footprint:
    """Stage 2 (Rajbhandari et al., ZeRO, 2020): float32 weights and moments in shards, in every mode, and gradients."""
    size = max(1, one.params // max(1, one.numbers))
    moments = {name: 4 * one.trained if kept >= one.trained > 0 else kept for name, kept in one.optimizer.items()}
    return replace(
        one,
        grads=_part(one.grads, devices),
        master=_part(4 * one.trained, devices),
        optimizer={name: _part(kept, devices) for name, kept in moments.items()},
        temporary=one.temporary + size * REDUCE_BUCKET,
        how=f"formula: traced on one device, ZeRO stage 2 over {devices}, a bucket of {REDUCE_BUCKET:,} gradients",
    )


def _xla(one: Footprint, _devices: int) -> Footprint:
    """Each device has all of the model; the batch is what one of them gets, as for the others."""
    return replace(one, how="formula: traced on one device, a CPU; XLA's compiler plans its own memory")


def _part(size: int, devices: int) -> int:
    return -(-size // devices)


FORMULAS: dict[str, Callable[[Footprint, int], Footprint]] = {
    "deepspeed": _deepspeed,
    "xla": _xla,
}
"""Strategy -> its formula."""
