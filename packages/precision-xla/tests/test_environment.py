"""The vendor's variables that change dtypes: refused here, and what they really do in this version."""

from __future__ import annotations

from typing import Any

import pytest

from precision_core import Fabric
from precision_xla import XLAPrecision
from precision_xla.environment import REFUSED, check_environment


@pytest.mark.parametrize("name", REFUSED)
def test_a_variable_that_would_change_the_run_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    for make in (lambda: XLAPrecision("bf16-mixed"), lambda: Fabric(accelerator="cpu", strategy="xla")):
        with pytest.raises(ValueError, match=f"the environment has {name}=1, which .*Unset {name}$"):
            make()
    monkeypatch.setenv(name, "0")
    XLAPrecision("bf16-mixed")
    check_environment({})


WHAT = """
    import torch, torch_xla
    device = torch_xla.device()
    third, big = torch.tensor([1 / 3]), torch.tensor([2**40])
    print(torch.equal(third.to(device).cpu(), third), torch.equal(big.to(device).cpu(), big))
"""


@pytest.mark.parametrize(
    ("variables", "kept"),
    [
        ({"XLA_USE_BF16": "1", "XLA_USE_32BIT_LONG": "1"}, "False False"),
        ({"XLA_USE_FP16": "1", "XLA_DOWNCAST_FP16": "1", "XLA_USE_F16": "1"}, "True True"),
    ],
    ids=["read", "not read"],
)
def test_what_they_do(run_python: Any, variables: dict[str, str], kept: str) -> None:
    """Whether a float32 and an int64 come back from the device as they were."""
    done = run_python(WHAT, **variables)
    assert done.returncode == 0, done.stderr
    assert kept in done.stdout  # the vendor says there that they will be deprecated
