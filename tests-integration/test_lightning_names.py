"""Lightning Fabric's methods and their parameters: here by the same name, or in the table of what differs."""

from __future__ import annotations

import importlib.util
import inspect
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from precision_core import Fabric
from precision_core.lightning_names import ABSENT, DIFFERENT

ROOT = Path(__file__).parents[1]
NAMES = """
import inspect, json
from lightning_fabric import Fabric
public = {name: value for name, value in inspect.getmembers(Fabric) if not name.startswith("_") or name == "__init__"}
properties = [name for name, value in public.items() if isinstance(value, property)]
methods = {name: [each for each in inspect.signature(value).parameters if each != "self"]
           for name, value in public.items() if name not in properties}
print(json.dumps([properties, methods]))
"""


def own_parameters(name: str) -> list[str]:
    return list(inspect.signature(getattr(Fabric, name)).parameters)


@pytest.mark.slow_start
@pytest.mark.skipif(not importlib.util.find_spec("lightning_fabric"), reason="Lightning Fabric is not installed")
def test_each_difference_is_in_the_table_and_nothing_else_is() -> None:
    command = [sys.executable, "-W", "ignore", "-c", NAMES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    properties, methods = json.loads(done.stdout.splitlines()[-1])
    assert {"device", "global_rank", "node_rank"} <= set(properties) and {"setup", "rank_zero_first"} <= set(methods)

    assert sorted(name for name in {*properties, *methods} if not hasattr(Fabric, name)) == sorted(ABSENT)
    assert all(isinstance(getattr(Fabric, name), property) for name in properties if name not in ABSENT)
    differing = {
        name: [each for each in parameters if not each.startswith("_") and each not in own_parameters(name)]
        for name, parameters in methods.items()
        if name not in ABSENT
    }
    assert {name: sorted(each) for name, each in differing.items() if each} == {
        name: sorted(each) for name, each in DIFFERENT.items()
    }


@pytest.mark.parametrize("name", ABSENT)
def test_what_is_not_here_says_what_to_use(name: str) -> None:
    with pytest.raises(AttributeError, match=f"no attribute '{name}', as Lightning's has: ") as error:
        getattr(Fabric(accelerator="cpu"), name)
    assert str(error.value).endswith(ABSENT[name])
    assert not hasattr(Fabric(accelerator="cpu"), name)


def test_the_page_is_made_from_the_table() -> None:
    page = runpy.run_path(str(ROOT / "ci" / "lightning.py"))
    assert page["PAGE"].read_text() == page["page"](), "run: python ci/lightning.py"
