"""FSDPStrategy on two ranks: what each mode stores, computes, reduces and returns, by value; groups, meshes, limits."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecision, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, SGD, Adafactor, AdamW

from precision_core import MODES, DoublePrecision, Fabric, HalfPrecision, Policy, Precision
from precision_core import MixedPrecision as CoreMixedPrecision
from precision_core.testing import RankError, run_in_ranks
from precision_fsdp import FSDPPrecision, FSDPStrategy

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


class Block(nn.Module):
    """Normalises, multiplies, and adds; `seen` holds the dtypes of its last forward."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)
        self.register_buffer("decay", torch.full((width,), 1.0 + 2.0**-9))
        self.seen: dict[str, torch.dtype] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        out = self.up(normed)
        self.seen = {"input": x.dtype, "norm": normed.dtype, "product": out.dtype}
        return x + out * self.decay


class Net(nn.Module):
    """Ids and a shift to logits, the head tied to the embedding."""

    def __init__(self, blocks: int = 2, width: int = 8) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embedding = nn.Embedding(16, width)
            self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        self.given = shift
        x = self.embedding(ids) + shift
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def score(self, ids: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """Another way in."""
        return self.head(self.embedding(ids) + shift).pow(2).mean()


def data(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(16, (4,), generator=generator), torch.randn(4, 8, generator=generator)


def make(
    precision: Any, model: nn.Module | None = None, lr: float = 0.1, **options: Any
) -> tuple[Fabric, Any, torch.optim.Optimizer]:
    fabric = Fabric(accelerator="cpu", strategy=FSDPStrategy(**options), precision=precision)
    model = Net() if model is None else model
    optimizer = AdamW(model.parameters(), lr=lr, eps=1e-4 if precision == "16-true" else 1e-8)  # 1e-8 is 0 in float16
    fabric.setup(model, optimizer)
    return fabric, model, optimizer


# -------------------------------------------------------------------- the table of modes, by value

TABLE = {  # params, compute, reduce, buffers, output
    "64-true": (F64, F64, F64, F64, F64),
    "32-true": (F32, F32, F32, F32, F32),
    "bf16-true": (BF16, BF16, BF16, BF16, F32),
    "16-true": (F16, F16, F16, F16, F32),
    "bf16-mixed": (F32, BF16, F32, F32, F32),
    "16-mixed": (F32, F16, F32, F32, F32),
    "16-master": (F16, F16, F32, F16, F32),
    "bf16-master": (BF16, BF16, F32, BF16, F32),
    "bf16-stochastic": (BF16, BF16, BF16, BF16, F32),
}


def stages(precision: Any, options: dict[str, Any] | None = None) -> dict[str, Any]:
    fabric, model, optimizer = make(precision, **options or {})
    ids, shift = data(fabric.global_rank)
    shift[0] = 1001.0  # not exact in bfloat16
    output = model(ids, shift)
    fabric.backward(output.pow(2).mean() * 1e-7)  # small enough for float16 under the first scale
    fabric.clip_gradients(model, optimizer, max_norm=1.0)
    optimizer.step()
    params = list(model.parameters())
    assert all(isinstance(param, DTensor) and isinstance(param.grad, DTensor) for param in params)
    half = model.embedding.weight.to_local().shape[0]
    assert half == 16 // fabric.world_size
    return {
        "params": {param.dtype for param in params},
        "gradients": {param.grad.dtype for param in params},
        "state": {value.dtype for state in optimizer.state.values() for key, value in state.items() if key != "step"},
        "buffers": {buffer.dtype for buffer in model.buffers()},
        "seen": model.blocks[1].seen,
        "output": output.dtype,
        "input kept": model.given.dtype is F32 and model.given[0, 0].item() == 1001.0,
        "steps": fabric.precision_plugin.steps + fabric.precision_plugin.skipped_steps,
    }


@pytest.mark.filterwarnings("ignore:.*casts buffers to:UserWarning")
@pytest.mark.parametrize("mode", MODES)
def test_every_stage_has_the_dtype_of_the_table(mode: str) -> None:
    params, compute, _, buffers, output = TABLE[mode]
    mixed = MODES[mode].mixed
    for found in run_in_ranks(2, stages, mode):
        assert found == {
            "params": {params},
            "gradients": {params},
            "state": {"bf16-master": {F32, torch.int16}, "16-master": {F32}}.get(mode, {params}),  # and masters
            "buffers": {buffers},
            "seen": {"input": F32 if mixed else compute, "norm": F32 if mixed else compute, "product": compute},
            "output": output,
            "input kept": mixed or mode == "32-true",
            "steps": 1,
        }


CORES: dict[str, Callable[[], Precision]] = {
    "bf16-mixed": lambda: CoreMixedPrecision("bf16-mixed", device="cpu"),
    "16-mixed": lambda: CoreMixedPrecision("16-mixed", device="cpu"),
    "bf16-true": lambda: HalfPrecision("bf16-true"),
    "64-true": lambda: DoublePrecision(),
    "32-true": lambda: Precision(),
}


def stages_of_cores(mode: str) -> dict[str, Any]:
    return stages(CORES[mode]())


@pytest.mark.filterwarnings("ignore:.*casts buffers to:UserWarning")
@pytest.mark.parametrize("mode", CORES)
def test_cores_own_plugins_run_with_shards_too(mode: str) -> None:
    params, compute, _, buffers, output = TABLE[mode]
    for found in run_in_ranks(2, stages_of_cores, mode):
        assert (found["params"], found["gradients"], found["state"]) == ({params}, {params}, {params})
        assert (found["seen"]["product"], found["buffers"], found["output"]) == (compute, {buffers}, output)


def gathered(precision: Any) -> list[str]:
    fabric, model, _ = make(precision)
    dtypes: list[str] = []
    model.blocks[0].up.register_forward_pre_hook(lambda layer, _: dtypes.append(str(layer.weight.dtype)))
    model(*data(fabric.global_rank))
    return [*dtypes, type(fabric.precision_plugin).__name__]


def test_strings_gather_in_the_compute_dtype_and_cores_object_in_float32() -> None:
    assert run_in_ranks(2, gathered, "bf16-mixed")[0] == ["torch.bfloat16", "FSDPPrecision"]
    assert run_in_ranks(2, gathered, CoreMixedPrecision("bf16-mixed", device="cpu"))[0][0] == "torch.float32"


# -------------------------------------------------------------------- reduction, by value

VALUES = [1.0, 1.0 + 2.0**-7, 1.0 + 5 * 2.0**-7, 1.0 + 2.0**-9, 1.0 + 2.0**-12, 1.0 + 2.0**-30]
"""What bfloat16 (8 bits), float16 (11) and float32 (24) hold of them, their sums with ones, and the means differs."""
ONES = [1.0] * len(VALUES)


def reduced(precision: Any, mixed_precision: Any = None) -> tuple[list[float], Policy, str]:
    """Returns the gradient of a weight whose gradient is VALUES on rank 0 and ONES on the others."""
    layer = nn.Linear(len(VALUES), 1, bias=False)

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", enabled=False):  # a gradient that no product rounds
                return (self.layer.weight * x.to(self.layer.weight.dtype)).sum()

    model = Sum()
    fabric = Fabric(accelerator="cpu", strategy=FSDPStrategy(mixed_precision), precision=precision)
    fabric.setup(model, SGD(model.parameters(), lr=1.0))
    values = VALUES if fabric.global_rank == 0 else ONES
    fabric.backward(model(torch.tensor(values, dtype=torch.float64)))
    gradient: Any = layer.weight.grad
    plugin = fabric.precision_plugin
    return gradient.full_tensor().double().flatten().tolist(), plugin.policy, str(plugin.report)


def expected(world_size: int, gradient: torch.dtype, reduce: torch.dtype, params: torch.dtype) -> list[float]:
    """Returns their mean: sent, added and divided in `reduce`, stored in `params`."""
    ranks = [torch.tensor(VALUES if rank == 0 else ONES, dtype=F64) for rank in range(world_size)]
    parts = [each.to(gradient).to(reduce) for each in ranks]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return (total / world_size).to(params).double().tolist()


CASES = [  # precision, the dtypes of gradients, reduction, and parameters
    ("32-true", F32, F32, F32),
    ("64-true", F64, F64, F64),
    ("bf16-true", BF16, BF16, BF16),
    ("params=bfloat16,reduce=float32", BF16, F32, BF16),
    ("params=float32,reduce=bfloat16", F32, BF16, F32),
    ("bf16-mixed", BF16, F32, F32),
    ("params=float32,compute=bfloat16,reduce=bfloat16", BF16, BF16, F32),
]


@pytest.mark.parametrize(("precision", "gradient", "reduce", "params"), CASES)
def test_gradients_are_reduced_in_the_policys_dtype(
    precision: str, gradient: torch.dtype, reduce: torch.dtype, params: torch.dtype
) -> None:
    for found, policy, _ in run_in_ranks(2, reduced, precision):
        assert policy.reduce is reduce
        assert found == expected(2, gradient, reduce, params)
        wrong = expected(2, gradient, {F32: BF16, BF16: F32, F64: F32}[reduce], params)
        assert found != wrong or params is BF16  # of two bfloat16 gradients the mean is the same; see below


def test_bfloat16_parameters_reduced_in_float32_are_told_from_bfloat16_on_three_ranks() -> None:
    wide, narrow = (expected(3, BF16, reduce, BF16) for reduce in (F32, BF16))
    assert run_in_ranks(3, reduced, "params=bfloat16,reduce=float32")[0][0] == wide
    assert run_in_ranks(3, reduced, "bf16-true")[0][0] == narrow
    assert wide != narrow


def documented_usage() -> Any:
    given = MixedPrecision(param_dtype=BF16, reduce_dtype=BF16, buffer_dtype=BF16)
    values, policy, report = reduced(FSDPPrecision(precision="bf16-mixed"), given)
    _, model, _ = make(FSDPPrecision(precision="bf16-mixed"), mixed_precision=given)
    return values, policy, report, {buffer.dtype for buffer in model.buffers()}


def test_the_documented_usage_really_reduces_in_bfloat16() -> None:
    for values, policy, report, buffers in run_in_ranks(2, documented_usage):
        assert values == expected(2, BF16, BF16, F32) != expected(2, BF16, F32, F32)
        assert (policy.reduce, policy.buffers, policy.output) == (BF16, BF16, F32) and buffers == {BF16}
        assert "reduce in bfloat16 as mixed_precision says, not in float32" in report
        assert "buffers in bfloat16 as mixed_precision says, not in float32" in report


def used_again() -> list[torch.dtype]:
    plugin = FSDPPrecision("bf16-mixed")
    reduces = []
    for given in (MixedPrecision(reduce_dtype=BF16), None, MixedPrecision(reduce_dtype=F16)):
        fabric = Fabric(accelerator="cpu", strategy=FSDPStrategy(given), precision=plugin)
        reduces.append(plugin.policy.reduce)
    fabric.teardown()
    return [*reduces, plugin.policy.reduce]


def test_a_plugin_that_is_used_again_has_its_own_policy() -> None:
    assert run_in_ranks(1, used_again) == [[BF16, F32, F16, F32]]


@pytest.mark.parametrize("output", [BF16, F32])
def test_the_output_dtype_of_mixed_precision_wins(output: torch.dtype) -> None:
    given = MixedPrecisionPolicy(output_dtype=output, cast_forward_inputs=True)
    for found in run_in_ranks(2, stages, "bf16-mixed", {"mixed_precision": given}):
        assert found["output"] is output and found["input kept"]


# -------------------------------------------------------------------- gradients, norms, accumulation


def alone(world_size: int, mode: str = "64-true") -> dict[str, torch.Tensor]:
    """Returns the gradients of one process on the global batch."""
    model = Net().to(MODES[mode].params)
    losses = [
        model(*(each if not each.is_floating_point() else each.to(MODES[mode].params) for each in data(rank)))
        for rank in range(world_size)
    ]
    (sum(loss.pow(2).mean() for loss in losses) / world_size).backward()  # type: ignore[union-attr]
    return {name: param.grad.double() for name, param in model.named_parameters()}  # type: ignore[union-attr]


def whole_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.grad.full_tensor().double().clone() for name, param in model.named_parameters()}  # type: ignore[union-attr]


def clipped(
    how: str, options: dict[str, Any] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], float, Any]:
    fabric, model, optimizer = make("64-true", **options or {})
    fabric.backward(model(*data(fabric.global_rank)).pow(2).mean())
    before = whole_gradients(model)
    if how == "value":
        norm = fabric.clip_gradients(model, optimizer, clip_val=0.01)
        return before, whole_gradients(model), 0.0, norm
    norm = fabric.clip_gradients(model, optimizer if how == "optimizer" else None, max_norm=0.1, norm_type=2.0)
    assert norm is not None and type(norm) is torch.Tensor
    return before, whole_gradients(model), norm.item(), None


@pytest.mark.parametrize("options", [{}, {"wrap": "*.up"}, {"mesh": (2, 1)}, {"mesh": (1, 2)}], ids=str)
def test_gradients_are_the_mean_over_ranks_and_the_norm_is_the_global_one(options: dict[str, Any]) -> None:
    reference = alone(2)
    norm = torch.stack([each.norm() for each in reference.values()]).norm().item()
    for before, after, found, _ in run_in_ranks(2, clipped, "optimizer", options):
        for name, gradient in reference.items():
            torch.testing.assert_close(before[name], gradient, rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(after[name], gradient * 0.1 / norm, rtol=1e-5, atol=1e-15)
        assert found == pytest.approx(norm, rel=1e-12)


def test_clipping_the_whole_model_and_by_value() -> None:
    reference = alone(2)
    norm = torch.stack([each.norm() for each in reference.values()]).norm().item()
    assert all(found[2] == pytest.approx(norm, rel=1e-12) for found in run_in_ranks(2, clipped, "model"))
    for _, after, _, returned in run_in_ranks(2, clipped, "value"):
        assert returned is None
        for name, gradient in reference.items():
            torch.testing.assert_close(after[name], gradient.clamp(-0.01, 0.01), rtol=1e-12, atol=1e-15)


def test_four_ranks_in_two_replicas_of_two_shards() -> None:
    reference = alone(4)
    for before, _, norm, _ in run_in_ranks(4, clipped, "model", {"mesh": (2, 2)}):
        for name, gradient in reference.items():
            torch.testing.assert_close(before[name], gradient, rtol=1e-12, atol=1e-15)
        assert norm == pytest.approx(torch.stack([each.norm() for each in reference.values()]).norm().item(), rel=1e-12)


def beside() -> tuple[float, float, float]:
    """Gradients of a sharded part and of a whole one beside it, clipped at once."""
    fabric, part, _ = make("64-true")
    model = nn.ModuleDict({"part": part, "rest": nn.Linear(16, 1).double()})
    fabric.backward(model["rest"](part(*data(fabric.global_rank))).mean())
    parts = [each.grad.full_tensor() if isinstance(each.grad, DTensor) else each.grad for each in model.parameters()]
    norm = torch.stack([each.norm() for each in parts]).norm().item()  # type: ignore[union-attr]
    found = fabric.clip_gradients(model, max_norm=0.5 * norm)
    again = fabric.clip_gradients(model, max_norm=1e9)
    fabric.clip_gradients(model, clip_val=1e-3)
    assert found is not None and again is not None and model["rest"].weight.grad.abs().max() <= 1e-3
    return norm, found.item(), again.item()


def test_sharded_gradients_and_whole_ones_beside_them_are_clipped_together() -> None:
    for norm, found, again in run_in_ranks(2, beside):
        assert found == pytest.approx(norm, rel=1e-12) and again == pytest.approx(norm / 2, rel=1e-5)


def accumulated(mode: str, synced: bool) -> dict[str, torch.Tensor]:
    scaler = {"init_scale": 256.0} if mode == "16-mixed" else None
    fabric, model, optimizer = make(FSDPPrecision(mode, scaler), wrap=Block)
    for number in range(3):
        with fabric.no_backward_sync(model, enabled=not synced and number < 2):
            ids, shift = data(2 * number + fabric.global_rank)
            fabric.backward(model(ids, shift).pow(2).mean() / 3)
    fabric.precision_plugin.unscale_gradients(optimizer)
    return whole_gradients(model)


@pytest.mark.parametrize(("mode", "tolerance"), [("64-true", 1e-12), ("bf16-mixed", 0.02), ("16-mixed", 0.005)])
def test_accumulation_without_reduction_gives_the_same_sum(mode: str, tolerance: float) -> None:
    reference = alone(6)
    norm = torch.stack([each.norm() for each in reference.values()]).norm()
    for synced in (False, True):
        for gradients in run_in_ranks(2, accumulated, mode, synced):
            off = torch.stack([(gradients[name] - each).norm() for name, each in reference.items()]).norm()
            assert off <= tolerance * norm


# -------------------------------------------------------------------- scaled losses


def overflow_on(which: int, options: dict[str, Any]) -> tuple[Any, ...]:
    """Twelve steps of which one overflows in the shard of rank `which` alone."""
    fused = options.pop("fused", False)
    fabric = Fabric(accelerator="cpu", strategy=FSDPStrategy(**options), precision="16-mixed")
    model = Net()
    optimizer = AdamW(model.parameters(), lr=0.01, fused=fused)
    fabric.setup(model, optimizer)
    plugin = fabric.precision_plugin
    norms = []
    for step in range(12):
        optimizer.zero_grad()
        fabric.backward(model(*data(fabric.global_rank)).pow(2).mean())
        if step == 8 and fabric.global_rank == which:
            model.blocks[0].up.weight.grad.to_local()[0, 0] = float("inf")
        before = [param.full_tensor().clone() for param in model.parameters()]
        if step % 2:
            norms.append(fabric.clip_gradients(model, optimizer, max_norm=0.1).item())  # type: ignore[union-attr]
        optimizer.step()
        same = all(torch.equal(old, new.full_tensor()) for old, new in zip(before, model.parameters(), strict=True))
        assert same == fabric.last_step_skipped and (step != 8 or same)
    values = [param.full_tensor().double().sum().item() for param in model.parameters()]
    return plugin.steps, plugin.skipped_steps, plugin.scale, norms, values


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=str)
@pytest.mark.parametrize("which", [0, 1])
def test_an_overflow_in_one_ranks_shard_is_a_skipped_step_on_all(which: int, options: dict[str, Any]) -> None:
    first, second = run_in_ranks(2, overflow_on, which, options)
    assert first == second
    assert first[0] + first[1] == 12 and first[1] >= 1


def kept_after_an_overflow() -> tuple[float, float, bool]:
    """An overflow in rank 1's shard is clipped, and added to by another backward: ranks must agree on what it was."""
    fabric = Fabric(
        accelerator="cpu", strategy=FSDPStrategy(), precision=FSDPPrecision("16-mixed", {"init_scale": 64.0})
    )
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.01)
    fabric.setup(model, optimizer)
    fabric.backward(model(*data(fabric.global_rank)).pow(2).mean())
    with fabric.precision_plugin.scaler.replacing():  # as if the reduction had made it
        if fabric.global_rank == 1:
            model.blocks[0].up.weight.grad.to_local()[0, 0] = float("inf")  # type: ignore[union-attr, operator]
    fabric.clip_gradients(model, optimizer, max_norm=1.0)
    fabric.backward(model(*data(fabric.global_rank)).pow(2).mean())
    between = fabric.precision_plugin.scale
    optimizer.step()
    return between, fabric.precision_plugin.scale, fabric.last_step_skipped


def test_gradients_that_are_kept_after_an_overflow_are_judged_alike_on_all_ranks() -> None:
    assert run_in_ranks(2, kept_after_an_overflow) == [(64.0, 32.0, True)] * 2


def with_a_scaler() -> tuple[bool, float, float]:
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)  # type: ignore[attr-defined]
    fabric, model, optimizer = make(FSDPPrecision("16-mixed", scaler))
    for _ in range(2):
        optimizer.zero_grad()
        fabric.backward(model(*data(fabric.global_rank)).pow(2).mean())
        optimizer.step()
    plugin: Any = fabric.precision_plugin
    return plugin.scaler.torch_scaler is scaler, plugin.scale, scaler.get_scale()


def test_the_users_scaler_is_the_one_in_use() -> None:
    assert run_in_ranks(2, with_a_scaler) == [(True, 128.0, 128.0)] * 2


# -------------------------------------------------------------------- the law of setup


def values_by_rank() -> list[list[float]]:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    fabric = Fabric(accelerator="cpu", strategy=FSDPStrategy(), precision="32-true")
    nn.init.constant_(model[0].weight, fabric.global_rank + 7.0)
    model[1].running_mean.fill_(fabric.global_rank + 7.0)  # type: ignore[union-attr, operator]
    model[0].bias.data = torch.arange(10.0)[::2] + fabric.global_rank  # not contiguous
    fabric.setup(model)
    tensors = (model[0].weight.full_tensor(), model[1].running_mean, model[0].bias.full_tensor())
    return [each.flatten().tolist() for each in tensors]  # type: ignore[union-attr]


def test_all_ranks_start_from_rank_zeros_values() -> None:
    for weight, mean, bias in run_in_ranks(2, values_by_rank):
        assert set(weight) == set(mean) == {7.0} and bias == [0.0, 2.0, 4.0, 6.0, 8.0]


def stepped(how: str, mode: str) -> float:
    model: Any = Net()
    if how == "compiled":
        model.blocks[0].compile(backend="eager")
    fabric = Fabric(accelerator="cpu", strategy=FSDPStrategy(), precision=mode)
    optimizer = SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    if how == "marked":
        fabric.mark_forward_method(model, "score")
    fabric.backward(model.score(*data(0)) if how == "marked" else model(*data(0)).pow(2).mean())
    optimizer.step()
    return model(*data(0)).pow(2).mean().item()


def test_a_marked_method_runs_sharded() -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    model.score(*data(0)).backward()
    optimizer.step()
    expected = model(*data(0)).pow(2).mean().item()
    assert run_in_ranks(2, stepped, "marked", "32-true") == [pytest.approx(expected, rel=1e-5)] * 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
@pytest.mark.parametrize("mode", ["32-true", "bf16-mixed"])
def test_compiled_blocks_run_sharded(mode: str) -> None:
    plain, compiled = (run_in_ranks(2, stepped, how, mode) for how in ("plain", "compiled"))
    assert plain == [pytest.approx(compiled[0], rel=1e-5)] * 2


def torn_down() -> tuple[bool, bool, bool]:
    fabric, model, _ = make("bf16-mixed", activation_checkpointing=True)
    before = dist.is_initialized()
    fabric.teardown()
    overridden = any("forward" in vars(module) for module in model.modules())
    return before, dist.is_initialized(), overridden


def test_teardown_gives_the_process_group_back() -> None:
    assert run_in_ranks(2, torn_down) == [(True, False, False)] * 2


def in_one_process() -> tuple[str, str]:
    fabric, model, optimizer = make("bf16-mixed")
    fabric.backward(model(*data(0)).pow(2).mean())
    optimizer.step()
    assert isinstance(model, FSDPModule) and isinstance(model, Net)
    assert model.head.weight.full_tensor().isfinite().all()  # type: ignore[operator]
    return str(fabric.precision_plugin.report), type(model).__name__


def test_one_process_works_and_says_so() -> None:
    report, name = run_in_ranks(1, in_one_process)[0]
    assert "fsdp: one process, nothing is divided: 3 groups" in report
    assert name == "FSDPNet"


def reports() -> list[str]:
    return [str(make("32-true", **options)[0].precision_plugin.report) for options in ({}, {"mesh": (2, 1)})]


def test_the_report_says_what_went_into_how_many_groups() -> None:
    report, replicated = run_in_ranks(2, reports)[0]
    assert "fsdp: 2 processes: 3 groups, 2 of Block, the rest in the root; 640 bytes of parameters here" in report
    assert "fsdp: 2 processes in 2 replicas of 1 shards: 3 groups" in replicated


# -------------------------------------------------------------------- what is refused


def _optimizer_with_state() -> None:
    model = Net()
    optimizer = AdamW(model.parameters())
    model(*data(0)).pow(2).mean().backward()
    optimizer.step()
    Fabric(accelerator="cpu", strategy="fsdp").setup(model, optimizer)


def _optimizer(kind: Any, **options: Any) -> None:
    model = Net()
    Fabric(accelerator="cpu", strategy="fsdp").setup(model, kind(model.parameters(), lr=0.1, **options))


def _parameters_beside() -> None:
    model = Net()
    fabric = Fabric(accelerator="cpu", strategy="fsdp")
    fabric.setup(model, SGD([*model.parameters(), nn.Parameter(torch.ones(3))], lr=0.1))


def _half_parameters() -> None:
    model = Net()
    model.blocks[1].up.half()
    make("16-mixed", model)


def _several_dtypes() -> None:
    class Keeps(Precision):
        def convert_module(self, module: nn.Module) -> nn.Module:
            return module

    model = Net()
    model.blocks[1].up.bias.data = model.blocks[1].up.bias.data.double()
    make(Keeps(), model)


def _tied_across() -> None:
    make("32-true", wrap=[Block, "head"])


PROBLEMS: dict[str, Any] = {
    "state": _optimizer_with_state,
    "fused sgd": lambda: _optimizer(SGD, fused=True),
    "adafactor": lambda: _optimizer(Adafactor),
    "lbfgs": lambda: _optimizer(LBFGS),
    "parameters beside": _parameters_beside,
    "half parameters": _half_parameters,
    "several dtypes": _several_dtypes,
    "tied": _tied_across,
    "twice": lambda: make("32-true", make("32-true")[1]),
    "mesh": lambda: make("32-true", mesh=(2, 2)),
    "wrap": lambda: make("32-true", wrap="Blok"),
    "recompute": lambda: make("32-true", nn.Linear(2, 2), activation_checkpointing=True),
    "offload": lambda: make("32-true", cpu_offload=True),
    "param_dtype": lambda: make("bf16-mixed", mixed_precision=MixedPrecision(param_dtype=F16)),
}

REASONS = {
    "state": r"this AdamW has state for 11 unsharded parameters, of shapes \(16, 8\).*make the optimizer after",
    "fused sgd": "SGD cannot run under FSDPStrategy: torch has no fused SGD for shards; pass fused=False",
    "adafactor": "Adafactor cannot run under FSDPStrategy",
    "lbfgs": "LBFGS cannot run under FSDPStrategy",
    "parameters beside": r"holds parameters of a sharded model and others beside them.*shape \(3,\)",
    "half parameters": r"16-mixed trains float32 parameters, these are not: blocks\.1\.up\.weight \(float16\)",
    "several dtypes": r"blocks\.1\.up \(Linear\) trains parameters of several dtypes: weight in float32, bias in f",
    "tied": r"embedding\.weight and head\.weight are one tied parameter in two groups of FSDP, the root and head",
    "twice": "is set up already|is sharded already",
    "mesh": r"mesh=\(2, 2\)\) is for 4 processes, not 2",
    "wrap": r"wrap='Blok'\) matches no module of this Net; did you mean .Block.\?",
    "recompute": r"activation_checkpointing=True\) found no repeated block in this Linear",
    "offload": "cpu_offload=True needs an accelerator",
    "param_dtype": r"param_dtype=torch\.float16, and this precision computes in torch\.bfloat16",
}


def refusals() -> dict[str, str]:
    messages = {}
    for problem, call in PROBLEMS.items():
        with pytest.raises((ValueError, RuntimeError)) as caught:
            call()
        messages[problem] = str(caught.value)
    return messages


def test_what_is_refused_says_why_and_the_way_out() -> None:
    for found in run_in_ranks(2, refusals):
        assert found.keys() == REASONS.keys()
        for problem, message in found.items():
            assert re.search(REASONS[problem], message, re.DOTALL), (problem, message)


def test_arguments_are_checked_at_construction() -> None:
    for options, message in (
        ({"state_dict_type": "local"}, r"state_dict_type='local'\): allowed are sharded, full"),
        ({"mesh": (0, 2)}, r"mesh=\(0, 2\)\): expected a DeviceMesh"),
        ({"mesh": 2}, r"mesh=2\): expected a DeviceMesh"),
        ({"wrap": 3}, r"wrap=3\): expected classes of modules"),
        ({"wrap": nn.Linear(2, 2)}, r"wrap=Linear\(.*\)\): expected classes of modules"),
        ({"wrap": [int]}, r"wrap=<class 'int'>\): expected classes of modules"),
        ({"activation_checkpointing": 3}, r"activation_checkpointing=3\): expected classes"),
        ({"init_fn": 3}, r"init_fn=3\): expected a function of a module"),
        ({"backend": 5}, r"backend=5\): expected a name such as"),
        ({"timeout": 30}, r"timeout=30\): expected datetime\.timedelta\(seconds="),
        ({"cpu_offload": "false"}, r"cpu_offload='false'\): expected True or False"),
        *(
            ({"reshard_after_forward": given}, r"reshard_after_forward=.*\): expected True, False, or a number")
            for given in ("no", 1.5, 0, -1, None)
        ),
    ):
        with pytest.raises(ValueError, match=message):
            FSDPStrategy(**options)  # type: ignore[arg-type]


def test_without_a_process_group_it_says_how_to_make_one() -> None:
    strategy = FSDPStrategy()
    strategy.connect(FSDPPrecision())
    with pytest.raises(RuntimeError, match=r"no process group: run it in Fabric\(strategy=\.\.\.\), under torchrun"):
        strategy.setup_module(Net())


def test_a_failing_rank_is_seen() -> None:
    with pytest.raises(RankError, match="matches no module"):
        run_in_ranks(2, lambda: make("32-true", wrap="nothing"))  # a closure: kept ranks would end with it
