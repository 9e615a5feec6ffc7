import pytest

from precision_core import MODES, Policy
from precision_lab.modes import default_modes, parse_modes, split_modes

MIXED = "params=float32,compute=bfloat16"


@pytest.mark.parametrize(
    ("text", "modes"),
    [
        ("32-true", ["32-true"]),
        ("64-true, 32-true ,bf16", ["64-true", "32-true", "bf16"]),
        (MIXED, [MIXED]),
        (f"32-true,{MIXED},64-true", ["32-true", MIXED, "64-true"]),
        (f"{MIXED},params=float64", [MIXED, "params=float64"]),
        (f"{MIXED}; head: params=float32,buffers=float32,64", [f"{MIXED}; head: params=float32,buffers=float32", "64"]),
        (f"bf16-mixed; *.norm: 32-true,{MIXED}", ["bf16-mixed; *.norm: 32-true", MIXED]),
        (f"{MIXED},32-true; head: {MIXED}", [MIXED, f"32-true; head: {MIXED}"]),
    ],
)
def test_split(text, modes):
    assert split_modes(text) == modes


@pytest.mark.parametrize("text", ["", "32-true,", "32-tru", "32-true,compute=bfloat17", "bf16,bf16-mixed"])
def test_what_is_no_mode_or_comes_twice(text):
    with pytest.raises(ValueError, match=r"no mode|allowed|unknown|twice"):
        parse_modes(text)


def test_the_error_is_that_of_parse():
    with pytest.raises(ValueError) as expected:
        Policy.parse("bf16-mixd")
    with pytest.raises(ValueError) as found:
        parse_modes("32-true,bf16-mixd")
    assert str(found.value) == str(expected.value)


def test_defaults_are_cores_modes():
    assert [str(policy) for policy in default_modes()] == list(MODES)
