import importlib.util
import sys
from pathlib import Path

import pytest

# Tests are imported by their files alone, so what they share is imported here, once.
spec = importlib.util.spec_from_file_location("planted", Path(__file__).with_name("planted.py"))
assert spec is not None and spec.loader is not None
planted = sys.modules["planted"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(planted)


@pytest.fixture(scope="module", autouse=True)
def bare():
    """Not as in the other tests: loops of whatever libraries are installed are observed."""
