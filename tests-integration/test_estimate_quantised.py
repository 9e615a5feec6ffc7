"""What `precision estimate` says of quantised layers, adapters and 8-bit states, against what real steps allocate."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from precision_core import Fabric
from precision_lab import Task, estimate
from precision_lab.gpt import GPT, GPTConfig
from precision_lab.train import cross_entropy
from precision_lab.variants import split_variants, varied

pytest.importorskip("precision_bnb", reason="precision-bnb is not installed here")


def gpt() -> Task:
    model = GPT(GPTConfig(48, 2, 4, 64))

    def batches(seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randint(256, (4, 65), generator=generator)

    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    return Task(model, optimizer, batches, lambda model, x: cross_entropy(model(x[:, :-1]), x[:, 1:]))


def allocated(mode: str, make: Callable[[], Task]) -> int:
    """The most bytes at a time, over set-up and three steps."""
    fabric = Fabric("cpu", precision=mode)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        made = make()
        model, optimizer = fabric.setup(made.model, made.optimizer)
        batches = made.stream(0)
        for _ in range(3):
            optimizer.zero_grad()
            fabric.backward(made.compute_loss(model, next(batches)))
            optimizer.step()
    assert profiled.profiler is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


MORE = ("nf4-dq", "int8", "fp4", "int8+lora", "bf16-mixed+lora")


@pytest.mark.parametrize(
    "mode", ["nf4", "int8-training", "nf4+lora", *(pytest.param(m, marks=pytest.mark.full) for m in MORE)]
)
def test_the_peak_is_what_real_steps_allocate(mode: str) -> None:
    (found,) = estimate(gpt, mode).rows
    assert (found.mode, found.reason) == (mode, "")
    precision, changes = split_variants(mode)
    # twice: what a library makes once is no step's
    _, most = (allocated(precision, varied(gpt, changes)) for _ in range(2))
    assert found.peak == pytest.approx(most, rel=0.001)


@pytest.mark.full
@pytest.mark.slow_start
def test_states_of_8_bits_are_a_quarter() -> None:
    plain, small = estimate(gpt, ["bf16-true", "bf16-true+adam8bit"]).rows
    assert small.params == plain.params and small.of("optimizer") < 0.75 * plain.of("optimizer")
    allocated("bf16-true", varied(gpt, ["adam8bit"]))  # compiles
    assert small.peak == pytest.approx(allocated("bf16-true", varied(gpt, ["adam8bit"])), rel=0.001)


def test_what_is_quantised_afterwards_has_values() -> None:
    """Tables of codes are kept for the process; none may come from the trace."""
    assert estimate(gpt, "nf4-dq").rows[0].peak > 0
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64))
    x, right = torch.ones(2, 64), layer(torch.ones(2, 64)).detach()
    quantised = Fabric("cpu", precision="nf4-dq").setup_module(layer)
    out = quantised(x)
    assert type(out) is Tensor and (out - right).abs().max() < 0.2 and (out - right).abs().max() > 0


def test_set_up_that_takes_more_than_a_step_is_said() -> None:
    def large() -> Task:
        model = torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.Linear(1024, 4))
        batches = lambda seed: (torch.ones(1, 1024) for _ in range(9))  # noqa: E731
        return Task(model, torch.optim.SGD(model.parameters(), lr=0.1), batches, lambda model, x: model(x).sum())

    found = estimate(large, "nf4+lora,bf16-mixed")
    assert found.rows[0].set_up > 4 * 1024**2 > found.rows[0].peak
    (line,) = (line for line in found.beside() if "set-up" in line)
    assert line.startswith("set-up takes more than a step, where make() puts the model: nf4+lora ")
    assert "bf16-mixed" not in line
