import pytest

from precision_core import Policy
from precision_lab.exceptions import beyond_range, propose, rounding, spelled, swallowed
from precision_lab.sensitivity import Layer

BF16, FP16 = Policy.parse("bf16-true").params, Policy.parse("16-true").params


def layer(name, parameters=10, **figures):
    return Layer(name, "Linear", parameters, **figures)


def test_values_beyond_the_format_are_named_and_the_reason_has_both_ends():
    layers = [layer("a", outputs=81000.0), layer("b", inputs=81000.0), layer("c", outputs=60000.0)]
    assert beyond_range(layers, FP16) == {
        "a": "activations reach 81,000, float16 ends at 65,504",
        "b": "its input reaches 81,000, float16 ends at 65,504",
    }
    assert beyond_range(layers, BF16) == {}
    assert list(beyond_range(layers[2:], FP16)) == ["c"]  # where none is beyond, those nearly


def test_modules_of_one_name_are_one_pattern_when_all_are_meant():
    layers = [layer(f"blocks.{n}.{end}", unchanged={"bfloat16": share}) for n in range(3) for end, share in ENDS]
    assert swallowed(layers, BF16, {}) == {
        "*.norm": "in blocks.0.norm, 90% of its updates are below half the spacing of bfloat16"
    }
    some = swallowed(layers, BF16, {"blocks.1.norm": 0.0, "blocks.0.up": 0.5})  # what was counted wins
    assert list(some) == ["blocks.0.norm", "blocks.0.up", "blocks.2.norm"]


ENDS = [("norm", 0.9), ("up", 0.1)]


def test_few_modules_that_hold_most_of_the_error_are_an_exception_and_many_are_not():
    def layers(*errors):
        return [layer(f"m{n}", rounding={"bfloat16": error}) for n, error in enumerate(errors)]

    found = rounding(layers(0.1, 0.01, 0.01, 0.01), BF16)
    assert list(found) == ["m0"] and "moves the loss by 1.0e-01, 97% of all" in found["m0"]
    assert rounding(layers(0.1, 0.1, 0.1, 0.1), BF16) == {}
    assert rounding(layers(0.0, 0.0), BF16) == {}


def test_what_is_tried_follows_the_trouble():
    layers = [layer("", outputs=1e6), layer("block.down", outputs=81000.0, unchanged={"bfloat16": 0.5, "float16": 0.5})]
    tried = propose("16-mixed", "not finite", layers, {})
    assert [list(each) for each in tried] == [["block.down"], ["block"]]
    assert tried[1] == {"block": "block.down: activations reach 81,000, float16 ends at 65,504"}
    assert [list(each) for each in propose("bf16-true", "swallowed", layers, {})] == [["block.down"]]
    for mode in ("32-true", "bf16-mixed", "bf16-stochastic", "bf16-true; block: 32-true"):
        assert propose(mode, "swallowed", layers, {}) == []


@pytest.mark.parametrize("mode", ["bf16-true", "16-mixed", "bf16-stochastic", "bf16-master"])
def test_spelled_is_a_policy(mode):
    text = spelled(mode, {"*.norm": "", "head": ""})
    assert text == f"{mode}; *.norm: 32-true; head: 32-true" and str(Policy.parse(text)) == text


def test_a_packages_mode_has_ways_of_its_own():
    assert propose("nf4", "worse", [layer("a", outputs=1e9), layer("b")], {}) == []
