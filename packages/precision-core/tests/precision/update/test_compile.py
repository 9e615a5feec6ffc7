"""torch.compile of the model: modes that store more than torch does train as they do without."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from precision_core import Fabric
from precision_core.testing import Problem, curve_distance, loss_bound, train


@dataclass(frozen=True)
class Compiled(Problem):
    """The problem with a model that is compiled before setup."""

    backend: str = "aot_eager"

    def model(self) -> nn.Module:
        """Returns a new compiled model, the same weights each time."""
        torch.compiler.reset()
        compiled: nn.Module = torch.compile(super().model(), backend=self.backend)  # type: ignore[assignment]
        return compiled


@pytest.mark.usefixtures("true_modes_compile")
@pytest.mark.slow_start
@pytest.mark.parametrize("mode", ["bf16-master", pytest.param("bf16-stochastic", marks=pytest.mark.full)])
def test_the_losses_are_those_of_the_model_as_it_is(mode: str) -> None:
    curves = [train(Fabric("cpu", precision=mode), problem, steps=4) for problem in (Problem(), Compiled())]
    assert curves[0] == curves[1]


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.usefixtures("true_modes_compile")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own, as inductor imports
@pytest.mark.full
@pytest.mark.parametrize("mode", ["bf16-master", "bf16-stochastic"])
def test_inductors_losses_are_within_the_bound(mode: str) -> None:
    eager = train(Fabric("cpu", precision=mode), steps=20)
    compiled = train(Fabric("cpu", precision=mode), Compiled(backend="inductor"), steps=20)
    assert 0 < curve_distance(compiled, eager) <= loss_bound(mode, 20)
