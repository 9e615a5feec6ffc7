"""The host reads no value of a tensor in a step: on a GPU it would wait for all that the device has still to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import AdamW

from precision_core import MODES, Fabric
from precision_core.testing import HostReads, Problem, run_in_ranks, sgd
from precision_fsdp import FSDPPrecision

FIRST = 3
"""Steps in which 16-mixed looks once at what it cannot see otherwise: shards that somebody changed (core's guard)."""


def play_device(fabric: Fabric) -> None:
    """Has 16-mixed leave scale and flags where they are, as it does on every device but a CPU."""
    scaler: Any = fabric.precision_plugin.scaler
    if fabric.precision_plugin.policy.scale:
        scaler._scale._avoid_sync = scaler._records._avoid_sync = True
        scaler._scale._is_plain = False


def steps(
    mode: str, fused: bool, clip: dict[str, Any], accumulate: int, reads_skips: bool
) -> tuple[list[str], list[str]]:
    """Returns what was read in the first steps, and in the ten after them."""
    fabric = Fabric("cpu", strategy="fsdp", precision=FSDPPrecision(mode))
    play_device(fabric)
    problem = Problem()
    model = problem.model()
    optimizer = AdamW(model.parameters(), lr=1e-3, fused=True) if fused else sgd(model.parameters())
    fabric.setup(model, optimizer)
    rows = problem.batch(0).chunk(accumulate)
    found = []
    for count in (FIRST, 10):
        with HostReads(optimizer) as reads:
            for _ in range(count):
                optimizer.zero_grad()
                for number, part in enumerate(rows, start=1):
                    with fabric.no_backward_sync(model, enabled=number < accumulate):
                        fabric.backward(problem.loss(model, part))
                if clip:
                    fabric.clip_gradients(model, optimizer, **clip)
                optimizer.step()
                if reads_skips:
                    assert not fabric.last_step_skipped
        found.append(reads.lines)
    fabric.teardown()
    first, rest = found
    return first, rest


NORM = {"max_norm": 1.0}


def of(mode: str, *, fused: bool = False, clip: Any = None, accumulate: int = 1, reads: bool = False) -> Any:
    return run_in_ranks(1, steps, mode, fused, clip or {}, accumulate, reads)[0]


@pytest.mark.parametrize(
    ("clip", "accumulate"),
    [
        (NORM, 2),
        pytest.param(None, 1, marks=pytest.mark.full),
        pytest.param({"clip_val": 0.1}, 1, marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("mode", [mode for mode in MODES if not MODES[mode].scale])
def test_nothing_is_read(mode: str, clip: Any, accumulate: int) -> None:
    assert of(mode, clip=clip, accumulate=accumulate) == ([], [])


@pytest.mark.parametrize(("clip", "accumulate"), [(None, 1), (NORM, 2)])
@pytest.mark.parametrize("mode", ["16-mixed", pytest.param("16-master", marks=pytest.mark.full)])
def test_a_scaled_mode_reads_nothing_with_an_optimizer_that_skips_on_the_device(
    mode: str, clip: Any, accumulate: int
) -> None:
    first, rest = of(mode, fused=True, clip=clip, accumulate=accumulate)
    assert rest == []
    looks = accumulate * (2 if clip else 1)  # before each scaling, clip and step of gradients that carry the scale
    assert len(first) <= FIRST * looks and all("guard.py" in line and "changed: tolist" in line for line in first)


@pytest.mark.parametrize("mode", ["16-mixed", pytest.param("16-master", marks=pytest.mark.full)])
def test_other_optimizers_make_a_scaled_mode_read_whether_to_step(mode: str) -> None:
    _, rest = of(mode)
    assert len(rest) == 10 and all("loss_scaler.py" in line and line.endswith("item") for line in rest)


def test_what_is_asked_for_is_read() -> None:
    first, rest = of("32-true", clip=NORM | {"error_if_nonfinite": True})
    assert len(first + rest) == FIRST + 10 and all("clipping.py" in line for line in rest)
    _, rest = of("16-mixed", fused=True, reads=True)
    assert len(rest) == 10 and all("counters.py" in line for line in rest)
    assert of("bf16-mixed", reads=True) == ([], [])


def test_the_count_sees_what_a_loop_reads() -> None:
    def reading() -> list[str]:
        fabric = Fabric("cpu", strategy="fsdp")
        model = fabric.setup(Problem().model())
        with HostReads() as reads:
            loss = Problem().loss(model, Problem().batch(0))
            fabric.backward(loss)
            loss.item()
            torch.nn.utils.get_total_norm([param.grad for param in model.parameters()]).item()  # type: ignore[misc]
        return reads.lines

    assert [line.rpartition(" ")[2] for line in run_in_ranks(1, reading)[0]] == ["item", "item"]
