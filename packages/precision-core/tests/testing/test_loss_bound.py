"""The bound: legitimate variations lie within it, and a policy has that of its widest part."""

from __future__ import annotations

import math
from functools import cache

import pytest

from precision_core import MODES, Fabric, Policy
from precision_core.testing.controls import SimulatedRanks, variations
from precision_core.testing.loss_bound import CALIBRATION, curve_distance, loss_bound
from precision_core.testing.problem import Problem, adamw, train

PROBLEM = Problem(seed=12)  # not one of the seeds of the calibration
FULL = pytest.mark.full
STEPS = [20, pytest.param(100, marks=FULL)]  # the distances are the same shares of the bound at both
EXACT = ("optimizer for-loop", "optimizer foreach", "optimizer fused", "by hand")  # for what differs: bit for bit here
RUNS = [
    pytest.param(mode, name, marks=[FULL] if name == "3 microbatches" else [])
    for mode in MODES
    for name in variations(mode)
    if name not in EXACT
]


@cache
def reference(mode: str, steps: int) -> list[float]:
    return train(Fabric(accelerator="cpu", precision=mode), PROBLEM, steps=steps)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("mode", "name"), RUNS)
def test_a_variation_is_within_the_bound(mode: str, name: str, steps: int) -> None:
    distance = curve_distance(variations(mode)[name](PROBLEM, steps), reference(mode, steps))
    assert distance <= 0.6 * loss_bound(mode, steps)
    assert distance > 0 or name == "rows permuted"


@pytest.mark.parametrize("name", [pytest.param(EXACT[0], marks=FULL), *EXACT[1:]])  # what foreach=None is on a CPU
@pytest.mark.parametrize("mode", list(MODES))
def test_the_same_arithmetic_gives_the_same_curve(mode: str, name: str) -> None:
    run = variations(mode).get(name)
    assert run is not None or name in ("optimizer fused", "by hand")  # plain torch does not round by chance
    if run is not None:
        assert curve_distance(run(PROBLEM, 10), reference(mode, 20)[:10]) <= 0.1 * loss_bound(mode, 10)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("mode", ["32-true", "bf16-mixed", "bf16-true"])
def test_adamw_is_within_the_bound(mode: str, steps: int) -> None:
    curves = [
        train(Fabric(accelerator="cpu", precision=mode), PROBLEM, steps=steps, accumulate=accumulate, optimizer=adamw)
        for accumulate in (1, 2)
    ]
    assert 0 < curve_distance(*curves) <= loss_bound(mode, steps)


@pytest.mark.parametrize("steps", [50, pytest.param(100, marks=FULL)])  # 20 are too few for a gradient's rounding
@pytest.mark.parametrize("policy", ["params=float32,reduce=bfloat16", "params=float32,output=bfloat16"])
def test_a_narrow_part_of_a_policy_is_within_the_derived_bound(policy: str, steps: int) -> None:
    strategy = SimulatedRanks(ranks=2)
    curve = train(Fabric(strategy=strategy, precision=policy), PROBLEM, steps=steps, accumulate=2)
    distance = curve_distance(curve, reference("32-true", steps))
    assert loss_bound("32-true", steps) < distance <= loss_bound(policy, steps)


def test_every_mode_lies_between_its_calibrated_distances() -> None:
    assert set(CALIBRATION) == set(MODES)
    for each in CALIBRATION.values():
        assert each.legitimate <= 0.51 * each.bound and 1.5 * each.bound <= each.control


def test_the_bound_grows_with_the_root_of_the_steps_past_100() -> None:
    bounds = [loss_bound("bf16-true", steps) for steps in (1, 100, 400, 10_000)]
    assert bounds == pytest.approx([bounds[0], bounds[0], 2 * bounds[0], 10 * bounds[0]])


@pytest.mark.parametrize("steps", [0, -1])
def test_fewer_than_one_step_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        loss_bound("32-true", steps)


@pytest.mark.parametrize("mode", list(MODES))
def test_a_mode_has_its_own_bound(mode: str) -> None:
    assert loss_bound(mode, 100) == loss_bound(MODES[mode], 100) == CALIBRATION[mode].bound


@pytest.mark.parametrize(
    ("policy", "mode"),
    [
        (16, "16-mixed"),
        ("bf16", "bf16-mixed"),
        (Policy("bfloat16", master="float32"), "bf16-mixed"),
        (Policy("float16", master="float32", scale=True), "16-mixed"),
        (Policy("float32", "float16", scale=False), "16-mixed"),
        (Policy("float32", reduce="bfloat16"), "bf16-mixed"),
        (Policy("float64", output="float32"), "32-true"),
        (Policy("float64", "bfloat16"), "bf16-mixed"),
        (Policy("float32", "float64"), "32-true"),
        (Policy("float16", buffers="float32"), "16-true"),
        ("bf16-mixed; *.norm: 32-true", "bf16-mixed"),
        ("32-true; head: bf16-true", "bf16-true"),
        ("16-true; *.norm: 32-true; head: bf16-mixed", "bf16-mixed"),
    ],
)
def test_another_policy_has_the_bound_of_its_widest_part(policy: Policy | str | int, mode: str) -> None:
    assert loss_bound(policy, 50) == CALIBRATION[mode].bound


def test_distances() -> None:
    assert curve_distance([1.0, 2.0], [1.0, 2.0]) == 0.0
    assert curve_distance([3.0, 1.0], [2.0, 2.0]) == pytest.approx(0.5)
    assert curve_distance([2.2, 4.4], [2.0, 4.0]) == pytest.approx(math.sqrt(0.1) / 3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_curve_that_has_diverged_is_infinitely_far(value: float) -> None:
    assert curve_distance([1.0, value], [1.0, 1.0]) == math.inf
    with pytest.raises(ValueError, match="reference"):
        curve_distance([1.0, 1.0], [1.0, value])


@pytest.mark.parametrize(("losses", "reference"), [([1.0], [1.0, 1.0]), ([], [])])
def test_curves_that_cannot_be_compared_are_refused(losses: list[float], reference: list[float]) -> None:
    with pytest.raises(ValueError, match=f"curves of {len(losses)} and {len(reference)} steps"):
        curve_distance(losses, reference)
