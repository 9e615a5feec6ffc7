"""What is no matrix product computes in float32: by dtype, by its error beside autocast's, and after training."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from precision_core import Fabric, Policy
from precision_core.testing import Problem, Transformer, run_in_ranks
from precision_fsdp import FSDPPrecision, FSDPStrategy
from precision_fsdp.float32 import compute_in_float32


class Scale(nn.Module):
    """A norm as models define it themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), 1.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight / x.pow(2).mean().sqrt()


class Twice(nn.Module):
    """Holds a parameter beside children."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(4))
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.shift


LAYERS: dict[str, tuple[Any, Tensor, torch.dtype]] = {
    "LayerNorm": (lambda: nn.LayerNorm(4), torch.randn(2, 4), torch.float32),
    "RMSNorm": (lambda: nn.RMSNorm(4), torch.randn(2, 4), torch.float32),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), torch.randn(2, 4), torch.float32),
    "BatchNorm": (lambda: nn.BatchNorm1d(4), torch.randn(3, 4), torch.float32),
    "PReLU": (lambda: nn.PReLU(), torch.randn(2, 4), torch.bfloat16),
    "own": (Scale, torch.randn(2, 4), torch.float32),
    "Embedding": (lambda: nn.Embedding(5, 4), torch.arange(3), torch.float32),
    "beside children": (Twice, torch.randn(2, 4), torch.float32),
    "Linear": (lambda: nn.Linear(4, 3), torch.randn(2, 4), torch.bfloat16),
    "Conv1d": (lambda: nn.Conv1d(4, 3, 1), torch.randn(2, 4, 5), torch.bfloat16),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_compute_as_under_autocast_with_rounded_weights(name: str) -> None:
    make, x, dtype = LAYERS[name]
    torch.manual_seed(0)
    layer = make()
    for param in layer.parameters():
        param.data.normal_().copy_(param.data.bfloat16())  # what FSDP gathers is exact
    reference, gathered = copy.deepcopy(layer), copy.deepcopy(layer)
    restores = compute_in_float32(gathered, Policy.parse("bf16-mixed"))
    for param in gathered.parameters():
        param.data = param.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = reference(x), gathered(x)
    assert found.dtype is expected.dtype is dtype
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    found.float().pow(2).sum().backward()
    expected.float().pow(2).sum().backward()
    for param, other in zip(gathered.parameters(), reference.parameters(), strict=True):
        assert param.grad is not None and param.grad.dtype is torch.bfloat16
        torch.testing.assert_close(param.grad.float(), other.grad, rtol=0.02, atol=0.02)
    assert all(isinstance(param, nn.Parameter) for param in gathered.parameters())
    for restore in restores:
        restore()
    assert not any("forward" in vars(module) for module in gathered.modules())


def test_modules_under_an_exception_are_left_to_it() -> None:
    model = nn.ModuleDict({"a": nn.LayerNorm(4), "b": nn.LayerNorm(4)})
    compute_in_float32(model, Policy.parse("bf16-mixed; b: 32-true"))
    assert "forward" in vars(model["a"]) and "forward" not in vars(model["b"])


# -------------------------------------------------------------------- gradients summed over many tokens


class Tokens(nn.Module):
    """Tables, a norm, a convolution, products with biases, and parameters of its own."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(16, width, padding_idx=3)
        self.own = Doubled(16, width)
        self.frequent = nn.Embedding(16, width, scale_grad_by_freq=True)
        self.bag = nn.EmbeddingBag(16, width)
        self.shift = nn.Parameter(torch.randn(width))
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, width, 1)
        self.up = nn.Linear(width, width)
        self.head = nn.Linear(width, 16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.own(ids) + self.frequent(ids) + self.bag(ids)[:, None] + self.shift
        x = x + self.conv(self.norm(x).mT).mT
        return self.head(x + self.up(x).relu())


class Doubled(nn.Embedding):
    """Does more than its class."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def summed(strategy: str, mode: str) -> dict[str, float]:
    """Returns each gradient's relative error to float64, of 2 x 4 x 1024 tokens, most of them alike."""
    model = Tokens()
    reference = copy.deepcopy(model).double()
    ids = (torch.rand(8, 1024, generator=torch.Generator().manual_seed(1)).pow(4) * 16).long()
    target = ids.roll(-1, 1)

    def loss(model: nn.Module, rows: slice) -> Tensor:
        return nn.functional.cross_entropy(model(ids[rows]).flatten(0, 1), target[rows].flatten())

    (loss(reference, slice(0, 4)) / 2 + loss(reference, slice(4, 8)) / 2).backward()
    fabric = Fabric(accelerator="cpu", strategy=strategy, precision=mode)
    fabric.setup(model)
    rank = fabric.global_rank
    fabric.backward(loss(model, slice(4 * rank, 4 * rank + 4)))
    errors = {}
    for (name, param), (_, exact) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert param.grad is not None and exact.grad is not None
        grad: Any = param.grad.full_tensor() if isinstance(param.grad, DTensor) else param.grad
        grad = grad / fabric.precision_plugin.scale
        errors[name] = ((grad - exact.grad).norm() / exact.grad.norm()).item()
        if name == "table.weight":
            assert not grad[3].any() and grad[0].any()  # padding
    return errors


@pytest.mark.parametrize(("mode", "rounding"), [("bf16-mixed", 2.0**-9), ("16-mixed", 2.0**-12)])
def test_gradients_over_many_tokens_are_as_exact_as_those_of_ddp(mode: str, rounding: float) -> None:
    expected, found = run_in_ranks(2, summed, "ddp", mode)[0], run_in_ranks(2, summed, "fsdp", mode)[0]
    for name, error in found.items():
        assert error <= 1.5 * expected[name] + 2 * rounding, name  # weights and gradients are rounded once more


def statistics() -> tuple[list[float], str, set[torch.dtype]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    model.register_buffer("other", torch.ones(1))
    half = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
    fabric = Fabric(accelerator="cpu", strategy=FSDPStrategy(half), precision=FSDPPrecision("bf16-mixed"))
    nn.init.constant_(model[1].running_mean, 1.0 + 2.0**-12)  # not exact in bfloat16
    fabric.setup(model)
    assert model.other.dtype is torch.bfloat16
    model.eval()(torch.ones(1, 2, 2, 2))
    kept = model[1].running_mean.tolist()
    model.train()
    fabric.backward(model(torch.randn(2, 2, 3, 3)).sum())
    return kept, str(fabric.precision_plugin.report), {each.dtype for each in model[1].buffers()}


def test_running_statistics_stay_float32_beside_widened_weights() -> None:
    for kept, report, dtypes in run_in_ranks(2, statistics):
        assert kept == [1.0 + 2.0**-12] * 3 and dtypes == {torch.float32, torch.int64}
        assert "1.running_var           kept in float32: torch's batch norm" in re.sub(
            " +kept", " " * 11 + "kept", report
        )


# -------------------------------------------------------------------- errors to float64


def errors(train: bool) -> dict[str, float]:
    """Returns the relative error to float64 of logits, for three ways to run bf16-mixed with shards."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    problem = Problem()
    torch.manual_seed(0)
    model = Transformer()
    if train:
        trained_in(model, "bf16-mixed", problem)
    tokens = problem.batch(0)[:, :-1]
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(tokens)

        def error(logits: Tensor) -> float:
            return ((logits.double() - exact).norm() / exact.norm()).item()

        def shard(model: Any, policy: MixedPrecisionPolicy) -> Any:
            for block in model.blocks:
                fully_shard(block, mp_policy=policy)
            return fully_shard(model, mp_policy=policy)

        plain = shard(copy.deepcopy(model), MixedPrecisionPolicy(torch.bfloat16, torch.float32))
        plugin = FSDPPrecision("bf16-mixed")
        ours = shard(plugin.convert_module(copy.deepcopy(model)), plugin.setup_mixed_precision_policy())
        with plugin.forward_context():
            return {"autocast": error(model(tokens)), "ours": error(ours(tokens)), "FSDP's casts": error(plain(tokens))}


def trained_in(model: nn.Module, mode: str, problem: Problem) -> None:
    """Trains a sharded copy of `model`, and gives `model` its values: norm weights that bfloat16 does not hold."""
    fabric, sharded = Fabric(accelerator="cpu", strategy="fsdp", precision=mode), copy.deepcopy(model)
    optimizer = torch.optim.AdamW(sharded.parameters(), lr=3e-3)
    fabric.setup(sharded, optimizer)
    for step in range(60):
        optimizer.zero_grad()
        fabric.backward(problem.loss(sharded, problem.batch(step)))
        optimizer.step()
    model.load_state_dict({name: value.full_tensor() for name, value in sharded.state_dict().items()})
    weight: Any = model.norm.weight
    assert not torch.equal(weight, weight.bfloat16().float())


@pytest.mark.parametrize("train", [False, True], ids=["fresh", "trained"])
def test_the_error_is_autocasts_and_well_below_that_of_fsdps_own_casts(train: bool) -> None:
    found = run_in_ranks(1, errors, train)[0]
    assert found["ours"] < 1.4 * found["autocast"] and found["ours"] < 0.9 * found["FSDP's casts"]
