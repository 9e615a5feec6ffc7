"""Discovery: real metadata of throwaway distributions, listed without importing, loaded by name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from precision_core import Fabric, Precision, Strategy
from precision_core.support.discovery import KNOWN, PLUGINS, STRATEGIES, SUPPORT, find, load, missing, names

Install = Callable[..., None]


def test_names_are_listed_without_importing_anything(install: Install) -> None:
    install("kahan", "[precision.plugins]\nkahan-b = no_such_module:f\nkahan-a = no_such_module:f\n")
    install("other", "[precision.strategies]\nmine = no_such_module:S\n[console_scripts]\nx = y:z\n")
    before = set(sys.modules)
    listed = names(PLUGINS)
    assert [name for name in listed if name.startswith("kahan")] == ["kahan-a", "kahan-b"] and "x" not in listed
    assert "mine" in names(STRATEGIES) and "mine" not in names(PLUGINS) and "mine" not in names(SUPPORT)
    assert set(sys.modules) == before


@pytest.mark.slow_start
def test_listing_imports_no_backend_in_a_fresh_process() -> None:
    code = (
        "import sys, precision_core.support.discovery as d; before = set(sys.modules);"
        "[d.names(group) for group in (d.PLUGINS, d.STRATEGIES, d.SUPPORT)];"
        "print(sorted(m for m in set(sys.modules) - before if not m.startswith(('importlib', 'email', 'zipfile'))))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600).stdout == "[]\n"


def test_only_the_name_that_is_asked_for_is_imported(install: Install) -> None:
    install("lone", "[precision.plugins]\nlone = lone_module:make\n", "lone_module", "make = 'made'\n")
    install(
        "broken", "[precision.plugins]\nbroken = broken_module:make\n", "broken_module", "raise OSError('no .so')\n"
    )
    assert load(PLUGINS, "lone") == "made"
    assert "broken_module" not in sys.modules
    message = (
        'precision "broken" is broken_module:make of broken, which cannot be imported: OSError: no .so',
        'precision "gone" is lone_module:gone of gone, which cannot be imported: AttributeError',
    )
    install("gone", "[precision.plugins]\ngone = lone_module:gone\n")
    for name, start in zip(("broken", "gone"), message, strict=True):
        with pytest.raises(ImportError) as error:
            load(PLUGINS, name)
        assert str(error.value).startswith(start) and error.value.__cause__ is not None


def test_two_distributions_that_claim_one_name_are_both_named(install: Install) -> None:
    install("one", "[precision.plugins]\nclash = a:b\nfine = a:b\n")
    install("two", "[precision.plugins]\nclash = a:b\n")
    for call in (lambda: find(PLUGINS, "clash"), lambda: load(PLUGINS, "clash"), lambda: Fabric(precision="clash")):
        with pytest.raises(ValueError, match='precision "clash" is claimed by one and by two: uninstall all but one'):
            call()
    assert names(PLUGINS).count("clash") == 1 and find(PLUGINS, "fine") is not None


def test_a_distribution_that_is_found_twice_claims_once(install: Install, tmp_path: object) -> None:
    install("same", "[precision.plugins]\nsame = a:b\n")
    sys.path.append(sys.path[0])  # monkeypatch restores the whole path
    assert find(PLUGINS, "same") is not None


@pytest.mark.parametrize("mode", ["bf16-mixed", "bf16-mixed; head: 32-true", "16"])
def test_a_claim_on_a_mode_of_core_is_an_error(install: Install, mode: str) -> None:
    install("thief", "[precision.plugins]\nbf16-mixed = a:b\n16 = a:b\n")
    with pytest.raises(ValueError, match="is claimed by precision-core and by thief"):
        Fabric(accelerator="cpu", precision=mode)
    assert Fabric(accelerator="cpu", precision="bf16-true").precision_plugin.mode == "bf16-true"


def test_a_claim_on_a_strategy_of_core_is_an_error(install: Install) -> None:
    install("thief", "[precision.strategies]\nsingle_device = a:b\n")
    with pytest.raises(ValueError, match='strategy "single_device" is claimed by precision-core and by thief'):
        Fabric(accelerator="cpu", strategy="auto")


@pytest.mark.parametrize(
    ("argument", "name", "message"),
    [
        ("precision", "nf4", 'precision "nf4" needs precision-bnb: pip install ./packages/precision-bnb in a'),
        (
            "precision",
            "fp8-reference",
            'precision "fp8-reference" needs precision-te: pip install ./packages/precision-te',
        ),
        ("strategy", "fsdp", 'strategy "fsdp" needs precision-fsdp: pip install ./packages/precision-fsdp'),
        ("strategy", "deepspeed", 'strategy "deepspeed" needs precision-deepspeed: pip install'),
    ],
)
def test_a_known_name_says_what_to_install(argument: str, name: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        Fabric(accelerator="cpu", **{argument: name})
    assert message in str(error.value)


def test_every_known_name_says_what_to_install() -> None:
    for group, extras in KNOWN.items():
        for extra, known in extras.items():
            for name in known:
                assert f"needs precision-{extra}: pip install ./packages/precision-{extra} in" in missing(group, name)


def test_an_unknown_name_lists_what_is_installed_and_the_nearest(install: Install) -> None:
    install("mine", "[precision.plugins]\nbf16-magic = a:b\n[precision.strategies]\nring = a:b\n")
    with pytest.raises(ValueError, match=r"'nf5' is no mode: .*installed packages bring .*bf16-magic.*mean \"nf4\"\?"):
        Fabric(accelerator="cpu", precision="nf5")
    with pytest.raises(ValueError, match=r'strategy "rnig" is unknown.*ring.*did you mean "ring"\?'):
        Fabric(accelerator="cpu", strategy="rnig")


PLUGIN = """
from precision_core import HalfPrecision, Precision, Strategy

class Mine(Precision):
    def __init__(self, mode):
        super().__init__()
        self.given = mode

def half(mode):
    return HalfPrecision(mode.replace("half-mine", "bf16-true"))

class Ring(Strategy):
    name = "ring"

def nothing(mode=None):
    return None
"""


def test_a_mode_and_a_strategy_of_a_package_run_by_name(install: Install) -> None:
    entries = (
        "[precision.plugins]\nmine = mine_module:Mine\nhalf-mine = mine_module:half\nnothing = mine_module:nothing\n"
        "[precision.strategies]\nring = mine_module:Ring\nnothing = mine_module:nothing\n"
    )
    install("mine", entries, "mine_module", PLUGIN)
    fabric = Fabric(accelerator="cpu", precision="mine", strategy="ring")
    assert isinstance(fabric.precision_plugin, Precision) and fabric.precision_plugin.given == "mine"  # type: ignore[attr-defined]
    assert isinstance(fabric.strategy, Strategy) and fabric.strategy.name == "ring"
    with pytest.raises(ValueError, match='precision="mine; head: 32-true": Mine applies no exceptions; pass "mine"'):
        Fabric(accelerator="cpu", precision="mine; head: 32-true")
    takes = Fabric(accelerator="cpu", precision="half-mine; head: 32-true").precision_plugin
    assert str(takes.policy) == "bf16-true; head: 32-true"
    with pytest.raises(ValueError, match='precision="nothing": its factory returned a NoneType, not a Precision'):
        Fabric(accelerator="cpu", precision="nothing")
    with pytest.raises(ValueError, match='strategy="nothing": its factory returned a NoneType, not a Strategy'):
        Fabric(accelerator="cpu", strategy="nothing")
