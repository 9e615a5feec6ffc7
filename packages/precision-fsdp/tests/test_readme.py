"""The README's examples, with the CPU for the GPU and two ranks for four."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from precision_core.testing import run_in_ranks
from precision_fsdp import FSDPPrecision

README = (Path(__file__).parents[1] / "README.md").read_text()
FABRIC, BY_HAND, ON_META, FILLED = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


class GPT(nn.Module):
    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def run(kind: str, folder: Path | None = None) -> tuple[str, float]:
    model = GPT()
    names: dict[str, Any] = {"torch": torch, "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    if kind == "by hand":
        dist.init_process_group("gloo")
        names |= {"FSDPPrecision": FSDPPrecision, "fully_shard": fully_shard, "criterion": nn.functional.mse_loss}
        names["loader"] = [(torch.ones(2, 4), torch.zeros(2, 4))] * 3
        exec(BY_HAND, names)
        return names["precision"].mode, names["precision"].steps
    exec(FABRIC.replace("devices=4", 'devices=2, accelerator="cpu"'), names)
    if kind == "on meta":
        exec(ON_META, names | {"GPT": GPT, "config": None})
    if folder is not None:
        file = folder / "model.safetensors"
        names["fabric"].save_module(file, names["model"])
        names |= {"GPT": GPT, "config": None}
        exec(FILLED.replace('"model.safetensors"', repr(str(file))), names)
        assert names["model"](torch.ones(2, 4)).isfinite().all()
    return str(names["fabric"].precision_plugin.report), names["fabric"].world_size


def test_the_examples_run(tmp_path: Path) -> None:
    for report, ranks in run_in_ranks(2, run, "fabric"):
        assert ranks == 2 and "reduce in bfloat16 as mixed_precision says, not in float32" in report
    assert run_in_ranks(2, run, "by hand") == [("bf16-mixed", 3)] * 2
    assert run_in_ranks(2, run, "on meta")[0][1] == 2
    assert run_in_ranks(2, run, "filled", tmp_path)[0][1] == 2
