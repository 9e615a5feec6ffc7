"""The report begins with how much of the weights is quantised, and names experts that are not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from precision_bnb import MODES, BitsandbytesPrecision


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(4, 32, 64))
        self.bias = nn.Parameter(torch.zeros(4, 32))


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Conv1d(8, 8, 3), nn.Linear(32, 64, bias=False))
        self.positions = nn.Parameter(torch.zeros(1, 16, 64))
        self.experts = Experts()


@pytest.mark.parametrize("mode", MODES)
def test_the_share_of_the_weights_and_experts_by_name(mode: str) -> None:
    plugin, model = BitsandbytesPrecision(mode, torch.float32), Mixture()
    total = sum(param.numel() for param in model.parameters())
    plugin.convert_module(model)
    share, experts = round(100 * 2 * 64 * 32 / total), round(100 * 4 * 32 * 64 / total)
    first, second = str(plugin.report).splitlines()[:2]
    assert first.startswith(
        f"{mode}: {share} % of the weights quantised ({experts} % are experts, which stay as they are); around its own"
    )
    assert second.startswith("  2 converted, 1 ")
    assert plugin.report.skipped[0] == ("experts.up", "4 experts in one parameter, no layer: left as it is")
    plugin.convert_module(model)  # taken over
    assert str(plugin.report).splitlines()[0].startswith(f"{mode}: {share} % of the weights quantised")


@pytest.mark.parametrize(
    ("rest", "share"),
    [(0, "100 %"), (1, "99 %"), (10**6, "1 %"), (64 * 64, "50 %")],
    ids=["all", "most", "few", "half"],
)
def test_shares_are_whole_only_where_they_are(rest: int, share: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    if rest:
        model.register_parameter("rest", nn.Parameter(torch.zeros(rest)))
    plugin = BitsandbytesPrecision("nf4", torch.float32)
    plugin.convert_module(model)
    assert plugin.report.lead == f"{share} of the weights quantised"


def test_matrices_that_are_no_experts_are_called_matrices() -> None:
    class Gates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.zeros(3, 8, 8))

    plugin = BitsandbytesPrecision("nf4", torch.float32)
    plugin.convert_module(nn.Sequential(nn.Linear(64, 64), Gates()))
    assert plugin.report.skipped[0] == ("1.gate", "3 matrices in one parameter, no layer: left as it is")
    assert "experts" not in plugin.report.lead
