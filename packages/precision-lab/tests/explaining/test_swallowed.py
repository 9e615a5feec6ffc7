"""Updates below the spacing of bfloat16: told once with what was tried, and by `precision why` later."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import precision_lab
from precision_lab.cli import main
from precision_lab.explaining.before import Before, Param
from precision_lab.explaining.explanation import Explanation
from precision_lab.explaining.swallowed import _by_chance, explain_swallowed
from precision_lab.watching.watch import Watch


def train(path: Path, dtype: torch.dtype, lr: float, make: Callable[..., torch.optim.Optimizer]) -> Watch:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4)).to(dtype)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1.0)
    optimizer = make(model.parameters(), lr=lr)
    watched: Watch
    with precision_lab.watch(model, optimizer, every=10, file=path) as watched:
        for _ in range(90):
            model(torch.rand(8, 16).to(dtype)).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return watched


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_they_are_told_once_with_what_was_tried(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "run.jsonl"
    lr = 2e-4 if dtype == torch.bfloat16 else 1e-5
    watched = train(path, dtype, lr, lambda params, lr: torch.optim.AdamW(params, lr=lr, eps=1e-4))
    (finding,) = watched.findings
    assert watched.alarms == [] and finding["at"] == 10 and finding["share"] > 0.5
    found = Explanation.from_dict(finding["explanation"])
    assert found.kind == "swallowed updates" and found.phase == "optimizer"
    modes = [each.ours for each in found.remedies]
    bf16 = ['precision="bf16-master"', 'precision="bf16-stochastic"']
    assert modes == (bf16 if dtype == torch.bfloat16 else ['precision="16-master"'])
    assert all(each.helps for each in found.remedies)
    assert found.remedies[0].outcome.startswith("better: of 64 such steps 0 % of the way is lost, where it was ")
    result = CliRunner().invoke(main, ["why", str(path)])
    assert result.exit_code == 1 and "step 10: swallowed updates" in result.output
    assert "the loss no longer goes down" in " ".join(result.output.split())
    assert len(json.loads(CliRunner().invoke(main, ["why", str(path), "--json"]).output)["findings"]) == 1


@pytest.mark.parametrize("dtype, lr", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=str)
def test_updates_that_are_seen_are_not_told(tmp_path: Path, dtype: torch.dtype, lr: float) -> None:
    assert train(tmp_path / "a.jsonl", dtype, lr, torch.optim.SGD).findings == []


def sampled(optimizer: torch.optim.Optimizer, update: float) -> Before:
    old = torch.ones(1000).bfloat16()
    param = Param("w", old - update, old, torch.full_like(old, update), {}, 0)
    return Before(optimizer, [param], [{k: v for k, v in optimizer.param_groups[0].items() if k != "params"}])


def test_how_much_of_the_way_is_lost() -> None:
    sgd = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    found = explain_swallowed(sampled(sgd, 2.0**-10), {"w": 1.0}, 1.0)  # below 1 the spacing is 2**-8: half of its half
    assert found is not None and "Of 64 such steps, 100 % of the way is lost." in found.what
    master, stochastic = found.remedies
    assert master.outcome.startswith("better: of 64 such steps 0 % of") and stochastic.helps
    assert explain_swallowed(sampled(sgd, 2.0**-8), {"w": 0.0}, 0.3) is None  # nothing is lost


def test_what_is_rounded_by_chance_is_not_lost(tmp_path: Path) -> None:
    from precision_core import Fabric

    for mode in ("bf16-stochastic", "bf16-master", "bf16-true"):
        torch.manual_seed(0)
        model = nn.Linear(32, 32)
        nn.init.ones_(model.weight)
        fabric = Fabric(precision=mode, accelerator="cpu")
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=1e-3))
        with warnings.catch_warnings(), precision_lab.watch(model, optimizer, every=2, file=tmp_path / "a") as watched:
            warnings.simplefilter("ignore")  # core's own, of the same
            for _ in range(5):
                fabric.backward((model(torch.rand(4, 32)) * 0.01).sum())
                optimizer.step()
                optimizer.zero_grad()
        assert len(watched.findings) == (mode == "bf16-true")


def test_an_optimizer_whose_elements_depend_on_each_other_is_not_tried() -> None:
    class Other(torch.optim.SGD):
        pass

    Other.__module__ = "somewhere"
    found = explain_swallowed(sampled(Other([nn.Parameter(torch.ones(1))], lr=1.0), 2.0**-10), {"w": 1.0}, 1.0)
    assert found is not None
    assert [each.outcome for each in found.remedies] == ["not tried"] * 2 and "a step of Other" in found.notes[0]


def test_rounding_by_chance_is_right_on_average() -> None:
    value = torch.full((100_000,), 1 + 2.0**-9)  # a quarter of the way from 1 to the next number
    rounded = _by_chance(value, torch.Generator().manual_seed(0))
    assert set(rounded.tolist()) == {1.0, 1 + 2.0**-7}
    assert float((rounded > 1).float().mean()) == pytest.approx(0.25, abs=0.01)
