import pytest

from precision_core import MODES, Fabric, Policy
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


@pytest.mark.parametrize(
    ("text", "modes"),
    [
        ("64,bf16 , 16-true", ["64-true", "bf16-mixed", "16-true"]),
        (MIXED, ["bf16-mixed"]),
        ("params=bfloat16,buffers=float32", [str(Policy.parse("params=bfloat16,buffers=float32"))]),
    ],
)
def test_modes_of_core_are_spelled_as_their_policy(text, modes):
    assert parse_modes(text) == modes


@pytest.mark.parametrize("text", ["", "32-true,", "32-tru", "32-true,compute=bfloat17", "bf16,bf16-mixed"])
def test_what_is_no_mode_or_comes_twice(text):
    with pytest.raises(ValueError, match=r"no mode|allowed|unknown|twice"):
        parse_modes(text)


@pytest.mark.parametrize("mode", ["bf16-mixd", "compute=bfloat17", "nf5", "nf4", "my-hal; head: 32-true"])
def test_the_error_is_cores(mode, install):
    install("mine", "[precision.plugins]\nmy-half = no_such_module:make\n")
    with pytest.raises(ValueError) as expected:
        Fabric(accelerator="cpu", precision=mode)
    with pytest.raises(ValueError) as found:
        parse_modes(f"32-true,{mode}")
    assert str(found.value) == str(expected.value)


def test_a_mode_of_a_package_is_known_without_importing_it(install):
    install("mine", "[precision.plugins]\nmy-half = no_such_module:make\n")
    assert parse_modes(f"my-half,{MIXED},32") == ["my-half", "bf16-mixed", "32-true"]
    assert parse_modes("my-half; head: 32-true") == ["my-half; head: 32-true"]
    with pytest.raises(ValueError, match=r"'my-half' is given twice$"):
        parse_modes("my-half,my-half")
    install("thief", "[precision.plugins]\nmy-half = a:b\n")
    with pytest.raises(ValueError, match=r'"my-half" is claimed by mine and by thief'):
        parse_modes("my-half")


def test_defaults_are_cores_modes():
    assert default_modes() == list(MODES)
