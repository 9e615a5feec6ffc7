"""Hints: each name of other libraries is one mode here, mistakes of spelling are seen, and no other format is named."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from precision_core import MODES, Fabric, supports
from precision_core.policy.hints import ELSEWHERE, hint
from precision_core.support.discovery import KNOWN, PLUGINS, package_of

BROUGHT = [mode for modes in KNOWN[PLUGINS].values() for mode in modes]
ALL = [*MODES, *BROUGHT]


def meant(name: str) -> str | None:
    found = re.search(r'did you mean "(.+?)"\?', hint(name, ALL))
    return None if found is None else found[1]


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("fp16-mixed", "16-mixed"),
        ("fp16", "16-mixed"),
        ("FP16", "16-mixed"),
        ("mixed_float16", "16-mixed"),
        ("torch.float16", "16-mixed"),
        ("amp", "16-mixed"),
        ("O1", "16-mixed"),
        ("half", "16-true"),
        ("bfloat16", "bf16-mixed"),
        ("amp_bf16", "bf16-mixed"),
        ("no", "32-true"),
        ("float", "32-true"),
        ("double", "64-true"),
        ("fp8", "transformer-engine"),
        ("fp8-mixed", "transformer-engine"),
        ("transformer_engine", "transformer-engine"),
        ("fp-16", "16-mixed"),
        ("FP-16-mixed", "16-mixed"),
        ("bf-16-mixed", "bf16-mixed"),
        ("float-32", "32-true"),
        ("fp-8", "transformer-engine"),
        ("nf-4", "nf4"),
        ("nvfp4", "nvfp4-reference"),
        ("mxfp8", "mxfp8-reference"),
        ("4bit", "nf4"),
        ("bnb.nf4-dq", "nf4-dq"),
        ("8-bit", "int8"),
        # mistakes of spelling
        ("bf16-tru", "bf16-true"),
        ("16mixed", "16-mixed"),
        ("bf61-mixed", "bf16-mixed"),
        ("fp8-refrence", "fp8-reference"),
        ("int8-trainning", "int8-training"),
        ("nf4_qd", "nf4-dq"),
        ("nf5", "nf4"),
        # formats that nobody here has
        ("int4", None),
        ("fp6", None),
        ("fp17", None),
        ("128-true", None),
        ("int16-mixed", None),
        ("uint8", None),
        ("nonsense", None),
    ],
)
def test_what_is_meant(name: str, mode: str | None) -> None:
    assert meant(name) == mode


def test_what_else_it_may_be_and_whose_it_is() -> None:
    assert hint("bfloat16", MODES) == '; did you mean "bf16-mixed"? ("bf16-true" has bfloat16 weights, too)'
    assert hint("fp8", MODES) == ""  # an exception of a policy can be none of a package's
    assert hint("fp8", ALL, package_of) == (
        '; did you mean "transformer-engine"? (of precision-te; '
        '"fp8-reference" computes FP8\'s values in plain torch, on any device)'
    )
    assert '"bf16-mixed" is right where' in hint("auto", MODES)
    assert 'Fabric(precision="32-true", tf32=True)' in hint("tf32", ALL)


def test_the_table_names_what_there_is_and_each_name_once() -> None:
    names = [name for row in ELSEWHERE.values() for name in row.split()]
    assert len(names) == len(set(names)) and not set(names) & set(ALL)
    assert {mode for modes in ELSEWHERE for mode in modes} <= set(ALL)
    assert all(meant(name) == modes[0] for modes, row in ELSEWHERE.items() for name in row.split())


@pytest.mark.parametrize("name", ["fp16", "fp16-mixed", "bfloat16", "half", "amp", "fp8", "nvfp4"])
def test_fabric_and_supports_say_the_same(name: str) -> None:
    assert hint(name, ALL, package_of)
    expected = re.escape(hint(name, ALL, package_of) + " [unknown-mode]") + "$"
    for call in (lambda: Fabric(accelerator="cpu", precision=name), lambda: supports(name, "cpu")):
        with pytest.raises(ValueError, match=expected):
            call()


@pytest.mark.parametrize(
    ("value", "mode"),
    [(torch.bfloat16, "bf16-mixed"), (torch.float16, "16-mixed"), (torch.float64, "64-true"), (None, "32-true")],
    ids=str,
)
def test_a_dtype_is_no_mode_and_gets_its_hint(value: Any, mode: str) -> None:
    with pytest.raises(ValueError, match=rf'precision={value} is no mode: .*; did you mean "{mode}"\?'):
        Fabric(accelerator="cpu", precision=value)
