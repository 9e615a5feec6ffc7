"""The reference asks for no value of a tensor: on a GPU each would wait for it, three times a layer and step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from precision_core import Fabric
from precision_core.testing import reads_of_ten_steps, run_in_ranks
from precision_te import NVFP4, Delayed, TransformerEnginePrecision
from precision_te.plugin import MODES
from precision_te.recipes import RECIPES
from precision_te.reference.formats import FORMATS
from precision_te.reference.scaling import Quantized, per_tensor


def steps(recipe: Any, strategy: str = "auto") -> dict[str, int]:
    precision = TransformerEnginePrecision("bf16-mixed", engine="reference", recipe=recipe)
    return dict(reads_of_ten_steps(Fabric("cpu", strategy, precision=precision), clip={"max_norm": 1.0}))


@pytest.mark.parametrize(
    "recipe", [*RECIPES, Delayed(amax_compute_algo="most_recent", margin=1), NVFP4(disable_rht=True)]
)
def test_ten_steps_read_nothing(recipe: Any) -> None:
    assert steps(recipe) == {}


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.endswith("-reference")])
def test_no_mode_reads_anything_but_what_is_asked_for(mode: str) -> None:
    assert reads_of_ten_steps(Fabric("cpu", precision=mode), skipped=True) == {}


class Copies(TorchFunctionMode):
    """Counts tensors made of Python's numbers, which are copied to their device: the host waits for that, too."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.tensor, torch.as_tensor)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_copies_no_numbers_to_the_device(recipe: str) -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
    precision = TransformerEnginePrecision("bf16-mixed", engine="reference", recipe=recipe)
    precision.convert_module(model)
    with Copies() as copies:
        with precision.forward_context():
            output = model(torch.randn(16, 32))
        output.float().square().mean().backward()
    assert copies.count == 0


def in_ranks() -> dict[str, int]:
    return steps("delayed", "ddp")


def test_ten_steps_over_ranks_read_nothing() -> None:
    assert run_in_ranks(2, in_ranks) == [{}, {}]


def with_a_branch(one: Quantized, other: Quantized) -> Tensor:
    """Returns what `product` did before it chose without asking: the second way where the first has infinities."""
    result = (one.values * one.scales) @ (other.values * other.scales).T
    scaled = result * one.outer * other.outer
    if scaled.isfinite().all():
        return scaled
    small, large = torch.minimum(one.outer, other.outer), torch.maximum(one.outer, other.outer)
    rescaled = result * small * large
    return torch.where(scaled.isfinite() | ~rescaled.isfinite(), scaled, rescaled)


@pytest.mark.parametrize("scales", [(1.0, 1.0), (3.7, 0.0021), (2.0**-130, 2.0**120), (1e30, 1e-30), (1e-38, 1e-38)])
@pytest.mark.parametrize("bad", [None, float("inf"), float("nan")])
def test_products_are_bit_for_bit_those_of_a_branch(scales: tuple[float, float], bad: float | None) -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(rows, 48, generator=generator) for rows in (24, 32))
    if bad is not None:
        x[3, 5] = bad
    one, other = (
        per_tensor(each, FORMATS["e4m3"], torch.tensor(scale)) for each, scale in zip((x, y), scales, strict=True)
    )
    mine, theirs = one.product(other), with_a_branch(one, other)
    assert torch.equal(mine.view(torch.int32), theirs.view(torch.int32))
