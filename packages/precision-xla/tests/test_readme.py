"""The README's example, with the CPU for the TPU and one device for eight."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, Any] = {"__name__": "pasted"}
    exec(block.replace('"tpu"', '"cpu"').replace("devices=8", "devices=1"), names)
    assert names["fabric"].precision_plugin.steps == 4 and names["model"].weight.device.type == "xla"
