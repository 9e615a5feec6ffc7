"""The package's own names: all there, and bitsandbytes only where one of them needs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import precision_bnb


@pytest.mark.slow_start
def test_the_support_table_and_the_settings_import_no_bitsandbytes() -> None:
    code = (
        "import sys, precision_bnb, precision_bnb.support as support; rows = support.rows();"
        "config = precision_bnb.BitsAndBytesConfig.of('nf4-dq'); dir(precision_bnb);"
        "print(len(rows) > 0, config.mode, 'bitsandbytes' in sys.modules);"
        "from precision_bnb import quantize, BitsandbytesPrecision;"
        "print(callable(quantize), BitsandbytesPrecision('fp4').mode, 'bitsandbytes' in sys.modules)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert finished.stdout == "True nf4-dq False\nTrue fp4 True\n", finished.stderr


def test_every_public_name_is_listed_and_is_what_it_says() -> None:
    assert set(precision_bnb.__all__) <= set(dir(precision_bnb))
    for name in precision_bnb.__all__:
        assert name == "MODES" or getattr(precision_bnb, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'precision_bnb' has no attribute 'nowhere'"):
        precision_bnb.nowhere  # noqa: B018 - the attribute is the test
