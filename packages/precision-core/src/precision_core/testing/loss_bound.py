"""Whether two training curves of one mode agree: `curve_distance(losses, reference) <= loss_bound(policy, steps)`.

The distance is the root mean square over steps of the difference, relative to the reference's mean. Rounding moves each
step's loss by noise of its own, and a dtype's noise has that dtype's size, so no smoothing: means over windows of 2 to
50 steps told 16-mixed from bf16-mixed no more reliably.

The bound lies between what is legitimate and what is not, by the figures in `CALIBRATION`. Legitimate are sums in
another order and other engines (`controls.variations`); under mixed modes the engine that casts all parameters to the
compute dtype differs most. Not legitimate are one dtype lower, gradients left scaled, ranks summed, and ranks not
reduced (`controls.controls`). At 20, 50, 100 and 300 steps the largest legitimate distance is at most 0.51 of the
bound, and the smallest control at least 1.5 times. 16-mixed is that narrow; elsewhere it is at most 0.33 and at least
1.9 times.

A wider dtype than the policy's passes: a curve cannot show it, dtypes are tested by value. Where rounding is by chance,
the bound is for curves that round with the same bits, as those of `train` do: another seed of rounding takes up to
6.0e-04 in 100 steps (seeds 0 to 4, three roundings each).

Calibrated with `python benchmarks/calibrate_loss_bound.py`: seeds 0 to 4, torch 2.13, one thread of an x86-64 CPU (AMD
Zen 4: AVX-512 with bfloat16 products). On one seed `torch.compile` was inside of the legitimate distances, and so was
FSDP2 on two CPU ranks (32-true, bf16-mixed). `problem.adamw` on two seeds took up to 0.2 of the bound, 16-true left
out. bf16-master and bf16-stochastic: 20 and 100 steps, seeds 0 to 4 on an AMD EPYC with AVX512-BF16, 0 and 1 on an
Intel Xeon with AMX; AdamW took up to 0.2 of their bounds. 16-master: seeds 0 to 4, 20, 50 and 100 steps, on that EPYC;
AdamW took up to 0.32 of its bound. No GPU yet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from precision_core.policy.policy import MODES, Policy


@dataclass(frozen=True)
class Calibration:
    """The bound for up to 100 steps, and the distances that it lies between, at 100 steps over all seeds."""

    bound: float
    legitimate: float
    """The largest distance of a variation."""
    control: float
    """The smallest distance of a control."""


CALIBRATION: dict[str, Calibration] = {
    "64-true": Calibration(1e-14, legitimate=1.7e-16, control=6.4e-08),
    "32-true": Calibration(1e-06, legitimate=9.8e-08, control=3.2e-05),
    "16-mixed": Calibration(1.7e-05, legitimate=8.4e-06, control=3.3e-05),
    "16-true": Calibration(1e-04, legitimate=9.5e-06, control=7.6e-03),
    "bf16-mixed": Calibration(4e-04, legitimate=7.6e-05, control=7.7e-03),
    "bf16-true": Calibration(5e-04, legitimate=9.4e-05, control=6.9e-03),
    "16-master": Calibration(1.4e-05, legitimate=4.2e-06, control=5.1e-05),
    "bf16-master": Calibration(2e-04, legitimate=3.7e-05, control=7.7e-03),
    "bf16-stochastic": Calibration(2.5e-04, legitimate=6.6e-05, control=7.7e-03),
}
"""By mode, all at the one learning rate of `problem.sgd`."""

_STEPS = 100

_STORED = {
    torch.float64: "64-true",
    torch.float32: "32-true",
    torch.float16: "16-true",
    torch.bfloat16: "bf16-true",
}
_PASSED = _STORED | {torch.float16: "16-mixed", torch.bfloat16: "bf16-mixed"}


def loss_bound(policy: Policy | str | int, steps: int) -> float:
    """Returns the largest `curve_distance` of two curves of `policy` over `steps` steps.

    It stays as it is up to 100 steps, and grows with their square root from there, as noise that adds up does;
    calibrated up to 300. A policy that is no named mode has the widest bound of its parts: what keeps the
    parameters (master weights, if any) counts as that dtype's true mode, compute, reduction and output as its mixed
    mode, and so do exceptions.

    Raises:
        ValueError: fewer than one step, or an invalid policy.
    """
    if steps < 1:
        raise ValueError(f"loss_bound(steps={steps}): expected at least 1")
    policy = Policy.parse(policy)
    flats = (policy.flat, *(exception for _, exception in policy.exceptions))
    bound = max(CALIBRATION[mode].bound for flat in flats for mode in _modes(flat))
    return bound * math.sqrt(max(steps, _STEPS) / _STEPS)


def _modes(policy: Policy) -> Iterator[str]:
    if policy in MODES.values():
        yield str(policy)
        return
    yield "bf16-stochastic" if policy.rounding == "stochastic" else _STORED[policy.master or policy.params]
    yield from (_PASSED[dtype] for dtype in (policy.compute, policy.reduce, policy.output))


def curve_distance(losses: Sequence[float], reference: Sequence[float]) -> float:
    """Returns the RMS difference of two curves, relative to the mean of `reference`; inf if `losses` diverged.

    Raises:
        ValueError: curves of different lengths or without steps, or a reference that has diverged.
    """
    if len(losses) != len(reference) or not reference:
        raise ValueError(f"curves of {len(losses)} and {len(reference)} steps: expected equally many, at least one")
    if not all(map(math.isfinite, reference)):
        raise ValueError("the reference has losses that are not finite")
    if not all(map(math.isfinite, losses)):
        return math.inf
    squares = math.fsum((loss - other) ** 2 for loss, other in zip(losses, reference, strict=True))
    return math.sqrt(squares / len(reference)) / (math.fsum(reference) / len(reference))
