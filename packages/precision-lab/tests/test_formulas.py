"""Formulas for several processes: what is divided, what is added, and beside DeepSpeed's own tensors."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from precision_lab.footprint import KINDS, Footprint, trace
from precision_lab.formulas import FORMULAS, REDUCE_BUCKET, accelerate_says, sharded
from precision_lab.train import gpt_maker

ONE = Footprint("32-true", 800, 800, 8, {"exp_avg": 800, "step": 4}, 5, 70, 30, 2517, numbers=200, trained=200)


@pytest.mark.parametrize("strategy", FORMULAS)
def test_the_kinds_add_up_and_say_that_they_are_a_formula(strategy):
    assert sum(ONE.of(kind) for kind in KINDS) == ONE.peak
    found = sharded(ONE, strategy, 8)
    assert sum(found.of(kind) for kind in KINDS) == found.peak and found.how.startswith("formula: ")
    assert (found.strategy, found.devices, found.activations) == (strategy, 8, 70)


def test_what_was_traced_is_as_it_was_and_so_is_what_could_not_be():
    assert sharded(ONE, "single_device", 1) is sharded(ONE, "fsdp", 8) is ONE
    failed = Footprint("nf4", reason="why")
    assert sharded(failed, "deepspeed", 8) is failed


@pytest.mark.parametrize(("params", "optimizer"), [(800, 800), (400, 400)])
def test_deepspeed_has_float32_weights_and_moments_in_shards_in_every_mode(params, optimizer):
    state = {"exp_avg": optimizer, "step": 4}
    one = Footprint("mode", params, params, 0, state, 5, 70, 30, 0, numbers=200, trained=200)
    eight = sharded(one, "deepspeed", 8)
    assert (eight.params, eight.grads, eight.master) == (params, params // 8, 100)
    assert eight.optimizer == {"exp_avg": 100, "step": 1}
    assert eight.temporary == 30 + params // 200 * REDUCE_BUCKET


def test_of_two_engines_each_has_what_the_formula_says():
    """The parameters and moments that `precision compare --strategy deepspeed --devices 2` found, on a CPU."""
    import torch

    for mode, params in (("32-true", 5_090_560), ("bf16-true", 2_545_280)):
        found = sharded(trace(mode, gpt_maker(torch.device("cpu"))), "deepspeed", 2)
        moments = found.optimizer["exp_avg"] + found.optimizer["exp_avg_sq"]
        assert found.params == params and moments == 5_090_560


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("32-true", 16_000),
        ("bf16-mixed", 8000),
        ("16-true", 8000),
        ("bf16-master", 8000),
        ("64-true", None),
        ("nf4", None),
    ],
)
def test_accelerates_formula_has_four_times_the_float32_model_or_twice(mode, says):
    assert accelerate_says(1000, mode) == says


@pytest.mark.full
@pytest.mark.slow_start
@pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")
def test_accelerate_says_so_itself():
    code = "import accelerate.commands.estimate as e; " + (
        "print([max(e.estimate_training_usage(4000, x).values()) for x in ('float32', 'bfloat16', 'float16')])"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300).stdout
    expected = [accelerate_says(1000, mode) for mode in ("32-true", "bf16-mixed", "16-mixed")]
    assert said.splitlines()[-1] == str(expected)
