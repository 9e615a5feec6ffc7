"""Runs whose curves must exceed a mode's `loss_bound`, and runs whose curves must not.

controls    wrong on purpose, in one thing: beyond the bound. For any backend, given how it makes its Fabric.
variations  the same training in another order of arithmetic, or by another engine: within the bound. On one device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.func import functional_call

from precision_core.fabric import Fabric
from precision_core.policy.policy import MODES, Policy
from precision_core.precision.half import HalfPrecision
from precision_core.precision.mixed import MixedPrecision
from precision_core.strategies import SingleDeviceStrategy
from precision_core.testing.problem import BATCHES, ROWS, Problem, mean_curve, sgd, train

LOWER: dict[str, str | None] = {
    "64-true": "32-true",
    "32-true": "bf16-mixed",
    "bf16-mixed": "bf16-true",
    "bf16-true": None,
    "16-master": "bf16-master",
    "bf16-master": "bf16-true",
    "bf16-stochastic": None,
    "16-mixed": "bf16-mixed",
    "16-true": "bf16-true",
}
"""The mode that is one dtype lower; None: the same with `round_parameters` after each step."""

LEFT_SCALED = 16.0
"""The factor of gradients that were left scaled. A loss scale is larger, and so is the distance that it makes."""

Curve = list[float]
Run = Callable[[Problem, int], Curve]

# On a CPU torch's fused SGD leaves most of such parameters as they are, until pytorch/pytorch#192545 is released.
_HALF = (torch.float16, torch.bfloat16)


def round_parameters(model: nn.Module) -> None:
    """Rounds parameters to float8_e4m3fn values in place, keeping their dtype: one dtype below bfloat16."""
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(param.to(torch.float8_e4m3fn).to(param.dtype))


# ---------------------------------------------------------------- controls


@dataclass(frozen=True)
class Control:
    """A training run with one thing wrong: another `mode`, `options` of `train`, ranks that do not communicate."""

    mode: str
    options: Mapping[str, Any] = field(default_factory=dict)
    world_size: int = 1

    def run(self, make_fabric: Callable[[str], Fabric], problem: Problem | None = None, steps: int = 100) -> Curve:
        """Returns the run's curve; `make_fabric(mode)` is called once a rank, all of which this process runs."""
        return mean_curve(
            [
                train(
                    make_fabric(self.mode), problem, steps=steps, rank=rank, world_size=self.world_size, **self.options
                )
                for rank in range(self.world_size)
            ]
        )


def controls(mode: Policy | str | int) -> dict[str, Control]:
    """Returns the runs whose curves are not those of `mode`, by name.

    Raises:
        ValueError: a policy that is none of the modes.
    """
    name = str(Policy.parse(mode))
    if name not in LOWER:
        raise ValueError(f"there are controls for {', '.join(LOWER)}, not for {name}")
    lower = LOWER[name]
    return {
        "one dtype lower": Control(lower) if lower else Control(name, {"after_step": round_parameters}),
        "gradients left scaled": Control(name, {"gradient_factor": LEFT_SCALED}),
        "two ranks summed": Control(name, {"gradient_factor": 2.0}),
        "two ranks not reduced": Control(name, world_size=2),
    }


# ---------------------------------------------------------------- variations


def variations(mode: str, accelerator: str = "cpu") -> dict[str, Run]:
    """Returns runs (problem, steps -> curve) whose curves are those of `mode`, by name; `mode` is one of `MODES`."""
    make = partial(Fabric, accelerator)

    def run(problem: Problem, steps: int, **options: Any) -> Curve:
        return train(make(precision=mode), problem, steps=steps, **options)

    def permuted(problem: Problem, steps: int) -> Curve:
        return run(Permuted(problem.seed), steps)

    def ranks(problem: Problem, steps: int) -> Curve:
        strategy = SimulatedRanks(make().device, 2)
        return train(Fabric(strategy=strategy, precision=mode), problem, steps=steps, accumulate=2)

    def scale(problem: Problem, steps: int) -> Curve:
        options = {"init_scale": 2.0**8}
        mixed = MODES[mode].mixed
        plugin = MixedPrecision(mode, make().device, options) if mixed else HalfPrecision(mode, scaler=options)
        return train(make(precision=plugin), problem, steps=steps)

    policy, device = MODES[mode], make().device
    runs: dict[str, Run] = {
        "2 microbatches": partial(run, accumulate=2),
        "3 microbatches": partial(run, accumulate=3),
        "rows permuted": permuted,
        "2 ranks averaged": ranks,
        "optimizer for-loop": partial(run, optimizer=partial(sgd, foreach=False)),
        "optimizer foreach": partial(run, optimizer=partial(sgd, foreach=True)),
    }
    if policy.rounding == "nearest":  # plain PyTorch has no other
        runs["by hand"] = partial(by_hand, policy, device)
    if device.type != "cpu" or policy.params not in _HALF:
        runs["optimizer fused"] = partial(run, optimizer=partial(sgd, fused=True))
    if policy.mixed:
        runs["parameters cast"] = partial(by_hand, policy, device, cast_parameters=True)
    if policy.scale:
        runs["init_scale 2**8"] = scale
    return runs


class Permuted(Problem):
    """The problem with the rows of each batch in another order."""

    def batch(self, step: int) -> Tensor:
        """Returns the global batch of a step."""
        return super().batch(step)[torch.randperm(ROWS, generator=torch.Generator().manual_seed(step))]


class SimulatedRanks(SingleDeviceStrategy):
    """Treats each backward of an accumulation as another rank's, and averages them in the policy's reduce dtype."""

    def __init__(self, device: torch.device | str = "cpu", ranks: int = 2) -> None:
        super().__init__(device)
        self.ranks = ranks
        self._params: list[nn.Parameter] = []
        self._gradients: list[list[Tensor]] = []

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Moves the module, and stores its parameters."""
        self._params = list(super().setup_module(module).parameters())
        return module

    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Runs a rank's backward, from the mean over its own rows, and sets its gradients aside."""
        super().backward(tensor * self.ranks, module, *args, **kwargs)
        self._gradients.append([param.grad.to(self.precision.policy.reduce) for param in self._params])  # type: ignore[union-attr]
        for param in self._params:
            param.grad = None

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Steps with the mean over ranks."""
        for param, *gradients in zip(self._params, *self._gradients, strict=True):
            param.grad = (torch.stack(gradients).sum(0) / self.ranks).to(param.dtype)
        self._gradients.clear()
        self.precision.scaler.after_backward()  # as after a reduction in the last backward
        return super().optimizer_step(*args, **kwargs)


def by_hand(
    policy: Policy, device: torch.device | str, problem: Problem, steps: int, cast_parameters: bool = False
) -> Curve:
    """Trains as plain PyTorch code does, without Fabric or plugins, and returns the curve.

    With `cast_parameters` all of forward sees the parameters in the compute dtype, as engines that cast them do
    (FSDP2, DeepSpeed); plain autocast leaves embeddings and norms in float32.
    """
    model = problem.model().to(device)
    masters = [nn.Parameter(param.detach().clone()) for param in model.parameters()] if policy.master else []
    model.to(policy.params)
    optimizer = sgd(masters or model.parameters())
    scaler = GradScaler(torch.device(device).type, enabled=policy.scale)
    batches = [problem.batch(step).to(device) for step in range(BATCHES)]

    def forward(tokens: Tensor) -> Tensor:
        if not cast_parameters:
            return model(tokens)
        return functional_call(model, {name: p.to(policy.compute) for name, p in model.named_parameters()}, tokens)

    def context() -> AbstractContextManager[Any]:
        return torch.autocast(torch.device(device).type, policy.compute) if policy.mixed else nullcontext()

    curve = []
    for step in range(steps):
        optimizer.zero_grad()
        with context():
            loss = problem.loss(forward, batches[step % BATCHES])
        scaler.scale(loss).backward()
        for master, param in zip(masters, model.parameters(), strict=bool(masters)):
            master.grad, param.grad = param.grad.to(master.dtype), None  # type: ignore[union-attr]
        scaler.step(optimizer)  # which unscales the masters' gradients
        scaler.update()
        with torch.no_grad():
            for master, param in zip(masters, model.parameters(), strict=bool(masters)):
                param.copy_(master)  # a tie goes to even here, away from zero in a mode: one value in 65,536
        curve.append(loss.item())
    return curve
