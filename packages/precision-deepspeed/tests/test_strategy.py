"""What the loop does under each stage: values, accumulation, clipping, overflow; and what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precision_core import Fabric
from precision_core.override import is_overridden
from precision_core.testing import run_in_ranks
from precision_deepspeed import DeepSpeedPrecision, DeepSpeedStrategy

pytestmark = pytest.mark.filterwarnings("ignore:.*casts buffers to bfloat16", "ignore:.*casts buffers to float16")

STAGES = (0, 1, 2, 3)
MODES = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true")


def make(
    stage: int, mode: Any, model: nn.Module, optimizer: Any = torch.optim.SGD, **options: Any
) -> tuple[Fabric, torch.optim.Optimizer]:
    fabric = Fabric(accelerator="cpu", strategy=DeepSpeedStrategy(stage, **options), precision=mode)
    made = optimizer(model.parameters(), lr=1.0)
    fabric.setup(model, made)
    return fabric, made


def weights(model: nn.Module) -> Tensor:
    """Returns all parameters in one, in float64, as the optimizer has them: master weights where there are any."""
    from deepspeed.utils import safe_get_full_fp32_param

    parts = []
    for param in model.parameters():
        whole = safe_get_full_fp32_param(param) if hasattr(param, "_hp_mapping") or hasattr(param, "ds_id") else param
        parts.append(whole.detach().double().flatten())
    return torch.cat(parts)


def master_dtype(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.dtype:
    """Returns the dtype of what the optimizer steps; at stage 3 DeepSpeed shows it only while it does."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if not params:
        params = list(next(model.parameters())._z3_optimizer.fp32_partitioned_groups_flat)  # type: ignore[attr-defined]
    (dtype,) = {param.dtype for param in params}
    return dtype


class Net(nn.Module):
    """A linear layer, and its weight once more: stage 3 has to find that a parameter is used outside of its layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)
        self.register_buffer("table", torch.tensor([1.0, 1.001]))

    def forward(self, x: Tensor, *, extra: Tensor) -> tuple[Tensor, Tensor]:
        self.seen = extra.dtype
        self.computed = self.layer(x)
        return self.computed, (self.layer.weight[0, :3] * extra).sum()


# -------------------------------------------------------------------- the matrix


def values_of(stage: int, modes: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Returns what each mode does, one after the other in this process: each engine gets its own mode only."""
    from deepspeed.utils import safe_get_full_grad

    found = {}
    for mode in modes:
        model = Net()
        # 65536 is no float16: scaled by it, gradients of 1 would overflow.
        config = {"fp16": {"initial_scale_power": 8}} if mode == "16-true" else None
        fabric, optimizer = make(stage, mode, model, torch.optim.AdamW, config=config)
        params = {param.dtype for param in model.parameters()}
        # bfloat16 has 8 bits and keeps the first of these only, float16 has 11 and keeps two.
        parts = [torch.tensor([1.0, 1.0 + 2.0**-9, 1.0 + 2.0**-12]), torch.ones(3)]
        output, dot = model(torch.zeros(2, 4), extra=parts[fabric.global_rank])
        fabric.backward(dot + 0 * output.sum())
        norm = fabric.clip_gradients(model, optimizer, max_norm=1e6)
        gradient = safe_get_full_grad(model.layer.weight)
        assert norm is not None and gradient is not None
        true = gradient[0, :3].double() / (fabric.precision_plugin.scale if stage > 0 else 1.0)
        optimizer.step()
        state = {
            value.dtype
            for entry in optimizer.state.values()
            for key, value in entry.items()
            if key != "step" and isinstance(value, Tensor)
        }
        masters = master_dtype(model, optimizer)
        policy = fabric.precision_plugin.policy
        assert params == {policy.params}
        assert model.computed.dtype is policy.compute
        assert output.dtype is policy.output
        assert model.seen is (torch.float32 if policy.mixed else policy.params)  # keyword arguments are cast too
        assert state == {masters} == {policy.master or policy.params}
        assert model.table.dtype is policy.buffers
        assert not fabric.last_step_skipped and fabric.precision_plugin.steps == 1
        found[mode] = {"gradient": true.tolist(), "norm": float(norm), "policy": str(policy)}
        fabric.strategy._engine.destroy()  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_its_dtypes_and_true_gradients(
    stage: int, ranks: int, float16_ranks: Callable[..., Any]
) -> None:
    modes = tuple(mode for mode in MODES if (stage, mode) != (0, "16-true"))
    results = run_in_ranks(ranks, float16_ranks, values_of, stage, modes)
    for result in results:
        assert result == results[0]
        for mode, values in result.items():
            dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(mode, torch.float32)
            parts = [torch.tensor([1.0, 1.0 + 2.0**-9, 1.0 + 2.0**-12]).to(dtype), torch.ones(3).to(dtype)][:ranks]
            expected = sum(part / ranks for part in parts)  # in the dtype that they are reduced in
            assert values["gradient"] == expected.double().tolist(), mode  # type: ignore[union-attr]
            assert values["norm"] == pytest.approx(expected.double().norm().item(), rel=1e-3)  # type: ignore[union-attr]


def reduced(reduce: str) -> tuple[float, torch.dtype]:
    from deepspeed.utils import safe_get_full_grad

    model = Net()
    config = {"data_types": {"grad_accum_dtype": "fp32"}}
    fabric, optimizer = make(2, f"params=bfloat16,reduce={reduce}", model, config=config)
    output, dot = model(torch.zeros(2, 4), extra=torch.full((3,), 1.0 + 2.0**-7 * fabric.global_rank))
    fabric.backward(dot + 0 * output.sum())
    fabric.clip_gradients(model, optimizer, max_norm=1e6)
    gradient = safe_get_full_grad(model.layer.weight)
    return float(gradient[0, 0]), gradient.dtype


@pytest.mark.parametrize(("reduce", "expected"), [("float32", 1.0 + 2.0**-8), ("bfloat16", 1.0)])
def test_bfloat16_gradients_are_reduced_in_what_the_policy_says(reduce: str, expected: float) -> None:
    assert run_in_ranks(2, reduced, reduce) == [(expected, torch.float32)] * 2


def pure_state() -> set[torch.dtype]:
    model = Net()
    config = {"bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
    fabric, optimizer = make(2, "bf16-true", model, torch.optim.AdamW, config=config)
    assert fabric.precision_plugin.policy.master is None
    fabric.backward(model(torch.ones(2, 4), extra=torch.ones(3))[1])
    optimizer.step()
    values = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    return {value.dtype for value in values}


def test_pure_bfloat16_state() -> None:
    assert run_in_ranks(1, pure_state) == [{torch.bfloat16}]


# -------------------------------------------------------------------- the loop


def moved(stage: int, mode: str, loop: Callable[..., None]) -> tuple[list[float], int]:
    """Returns what one step of SGD with learning rate 1 subtracted."""
    model = Net()
    fabric, optimizer = make(stage, mode, model)
    before = weights(model)

    def loss(rows: Tensor) -> Tensor:
        output, dot = model(rows, extra=torch.zeros(3))
        return output.pow(2).mean() + 0 * dot

    loop(fabric, model, optimizer, loss)
    return (before - weights(model)).tolist(), fabric.precision_plugin.steps


def rows(rank: int) -> Tensor:
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(rank + 1))


def reference() -> Tensor:
    """Returns the mean of two ranks' gradients in float64."""
    gradients = []
    for rank in range(2):
        model = Net().double()
        model(rows(rank).double(), extra=torch.zeros(3).double())[0].pow(2).mean().backward()
        gradients.append(torch.cat([param.grad.flatten() for param in model.parameters() if param.grad is not None]))
    return (gradients[0] + gradients[1]) / 2


def at_once(fabric: Any, model: Any, optimizer: Any, loss: Any) -> None:
    fabric.backward(loss(rows(fabric.global_rank)))
    optimizer.step()


def in_two(fabric: Any, model: Any, optimizer: Any, loss: Any) -> None:
    for half in rows(fabric.global_rank).chunk(2):  # without no_backward_sync: it is right all the same
        fabric.backward(loss(half) / 2)
    optimizer.step()


def dropped_first(fabric: Any, model: Any, optimizer: Any, loss: Any) -> None:
    for clipped in (False, True):
        fabric.backward(loss(torch.ones(4, 4)) * 100)
        if clipped:
            fabric.clip_gradients(model, optimizer, max_norm=1e-3)
        optimizer.zero_grad()
    at_once(fabric, model, optimizer, loss)


def by_closure(fabric: Any, model: Any, optimizer: Any, loss: Any) -> None:
    results = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        results.append(loss(rows(fabric.global_rank)))
        fabric.backward(results[-1])
        return results[-1]

    with torch.no_grad():
        assert optimizer.step(closure) is results[0] and len(results) == 1


def after_an_overflow(fabric: Any, model: Any, optimizer: Any, loss: Any) -> None:
    plugin = fabric.precision_plugin
    scale, before = plugin.scale, weights(model)
    for rank in range(2):
        fabric.backward(loss(rows(0)) * (float("inf") if fabric.global_rank == rank else 1.0))
        norm = fabric.clip_gradients(model, optimizer, max_norm=1e-3)
        assert not torch.isfinite(norm)
        optimizer.step()
        assert fabric.last_step_skipped and plugin.skipped_steps == rank + 1
        assert plugin.scale == scale / 2 ** (rank + 1) and torch.equal(before, weights(model))
    at_once(fabric, model, optimizer, loss)
    assert not fabric.last_step_skipped and plugin.scale == scale / 4


def every_loop(stage: int) -> dict[str, tuple[list[float], int]]:
    runs = {"at once": at_once, "in two": in_two, "dropped": dropped_first, "closure": by_closure}
    found = {name: moved(stage, "32-true", loop) for name, loop in runs.items()}
    found["16-mixed after an overflow"] = moved(stage, "16-mixed", after_an_overflow)
    found["16-mixed dropped"] = moved(stage, "16-mixed", dropped_first)
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_loops_move_parameters_by_the_true_gradient(stage: int) -> None:
    expected = reference()
    for result in run_in_ranks(2, every_loop, stage):
        for name, (change, steps) in result.items():
            error = (torch.tensor(change, dtype=torch.float64) - expected).norm() / expected.norm()
            assert steps == 1 and error < (2e-3 if name.startswith("16") else 1e-6), name


def without_us() -> list[float]:
    from precision_deepspeed import deepspeed_config
    from precision_deepspeed.vendor import initialize

    torch.distributed.init_process_group("gloo")
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = deepspeed_config("16-mixed", {"zero_optimization": {"stage": 2}})
    engine = initialize(0, model=model, optimizer=optimizer, config=config)
    for step in range(4):
        loss = engine(torch.ones(3, 4)).pow(2).mean()
        engine.backward(loss * 1e38 if step == 0 else loss)
        engine.step()
    return [engine.optimizer.torch_autocast_gradscaler.get_scale(), engine.skipped_steps]


def test_deepspeed_alone_does_not_recover_from_an_overflow() -> None:
    """What `after_an_overflow` fixes. When this fails, DeepSpeed has fixed it, and engine.py may be simpler."""
    assert run_in_ranks(1, without_us) == [[2.0**16, 4]]


def norms_of_steps() -> list[float]:
    model = Net()
    fabric, optimizer = make(2, "32-true", model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.0)
    before = weights(model)
    norms = []
    for _ in range(2):
        fabric.backward(model(torch.ones(2, 4), extra=torch.ones(3))[0].pow(2).mean())
        optimizer.step()
        scheduler.step()
        norms.append((weights(model) - before).norm().item())
    return norms


def test_schedulers_move_the_engines_learning_rate() -> None:
    ((first, second),) = run_in_ranks(1, norms_of_steps)
    assert first > 0 and first == second


def stepped(compiled: bool) -> list[float]:
    model: Any = Net()
    fabric = Fabric(accelerator="cpu", strategy=DeepSpeedStrategy(2), precision="bf16-mixed")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    outer: Any = torch.compile(model, backend="eager") if compiled else model
    assert fabric.setup(outer, optimizer) == (outer, optimizer)
    fabric.backward(outer(rows(0), extra=torch.zeros(3))[0].pow(2).mean())
    optimizer.step()
    return weights(model).tolist()


def test_a_compiled_model_steps_the_same() -> None:
    assert run_in_ranks(1, stepped, True) == run_in_ranks(1, stepped, False)


def stepped_in_shards(mode: str, compiled: bool) -> list[float]:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
    outer: Any = torch.compile(model, backend="eager") if compiled else model
    fabric = Fabric(accelerator="cpu", strategy=DeepSpeedStrategy(3), precision=mode)
    _, optimizer = fabric.setup(outer, torch.optim.SGD(model.parameters(), lr=1.0))
    for _ in range(2):
        fabric.backward(outer(rows(0)).pow(2).mean())
        optimizer.step()
    return weights(model).tolist()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile asks for it
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")  # and makes one
@pytest.mark.parametrize("mode", ["bf16-mixed", "bf16-true"])
def test_a_compiled_model_steps_the_same_in_shards(mode: str) -> None:
    assert run_in_ranks(1, stepped_in_shards, mode, True) == run_in_ranks(1, stepped_in_shards, mode, False)


def evaluated(stage: int) -> tuple[list[float], bool]:
    linear = torch.nn.functional.linear
    fabric = Fabric(accelerator="cpu", strategy=DeepSpeedStrategy(stage), precision="bf16-mixed")
    with fabric.init_module():
        model = Net()
    sharded = hasattr(model.layer.weight, "ds_tensor")
    fabric.setup_module(model)
    with torch.no_grad():
        output, _ = model(torch.ones(2, 4), extra=torch.ones(3))
    assert output.dtype is torch.float32 and model.table.dtype is torch.float32
    assert model.table.tolist() == torch.tensor([1.0, 1.001]).tolist()
    fabric.teardown()
    assert torch.nn.functional.linear is linear and torch.zeros(1).dtype is torch.float32
    return output.flatten().tolist(), sharded


def test_evaluation_needs_no_optimizer_and_init_module_shards() -> None:
    whole, sharded = (run_in_ranks(2, evaluated, stage) for stage in (2, 3))
    assert [result[0] for result in whole] == [result[0] for result in sharded]
    assert [result[1] for result in whole + sharded] == [False, False, True, True]


def built(in_shards: bool) -> list[float]:
    fabric = Fabric(accelerator="cpu", strategy=DeepSpeedStrategy(3), precision="bf16-mixed")
    if in_shards:
        with fabric.init_module():
            model = Net()
    else:
        model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    fabric.backward(model(rows(fabric.global_rank), extra=torch.zeros(3))[0].pow(2).mean())
    optimizer.step()
    return weights(model).tolist()


def test_a_model_built_in_shards_trains() -> None:
    assert run_in_ranks(2, built, True) == run_in_ranks(2, built, False)


def after_two_backwards(stage: int, options: dict[str, Any]) -> list[float]:
    model = Net()
    fabric, optimizer = make(stage, "bf16-mixed", model, **options)
    for half in rows(fabric.global_rank).chunk(2):
        fabric.backward(model(half, extra=torch.zeros(3))[0].pow(2).mean())
    fabric.clip_gradients(model, optimizer, max_norm=0.01)
    optimizer.step()
    values: list[float] = weights(model).tolist()
    return values


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        (2, {"offload_optimizer": True}),
        (3, {"offload_optimizer": True, "offload_parameters": True}),
    ],
)
def test_offloading_steps_the_same(stage: int, options: dict[str, bool]) -> None:
    mine = run_in_ranks(2, after_two_backwards, stage, options)
    plain = run_in_ranks(2, after_two_backwards, stage, {})
    torch.testing.assert_close(torch.tensor(mine), torch.tensor(plain), rtol=1e-6, atol=1e-7)


def alone() -> int:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    for stage in (2, 3, 2):  # and again after teardown
        model = Net()
        fabric, optimizer = make(stage, "bf16-mixed", model)
        for _ in range(2):
            output, dot = model(torch.ones(2, 4), extra=torch.ones(3))
            fabric.backward(dot + 0 * output.sum())
            optimizer.step()
        fabric.teardown()
        assert "LOCAL_RANK" not in os.environ
        assert not is_overridden(model, "forward") and not {"step", "zero_grad"} & vars(optimizer).keys()
    return fabric.precision_plugin.steps


def test_it_starts_alone_without_anybodys_variables() -> None:
    assert run_in_ranks(1, alone) == [2]


# -------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"stage": 7}, ["7", "0, 1, 2 and 3"]),
        ({"stage": True}, ["True"]),
        ({"stage": 2, "offload_parameters": True}, ["stage=3"]),
        ({"stage": 0, "offload_optimizer": True}, ["stage=1, 2 or 3"]),
        ({"stage": 2, "config": {"zero_optimization": {"stage": 3}}}, ["stage=2", "= 3"]),
        ({"stage": 2, "config": {"zero_optimization": {"stage": 1}}}, ["stage=2", "= 1"]),
        ({"stage": 2, "config": "ds.json"}, ["dict", "json.load"]),
        ({"stage": 2, "offload_optimizer": "nvme"}, ["offload_optimizer='nvme'", "zero_optimization"]),
        (
            {"offload_optimizer": True, "config": {"zero_optimization": {"offload_optimizer": {"device": "none"}}}},
            ["offload_optimizer=True", "none", "contradict"],
        ),
    ],
)
def test_arguments_that_cannot_be(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        DeepSpeedStrategy(**arguments)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.usefixtures("float16_accelerator")
def test_float16_without_zero_is_refused_by_fabric() -> None:
    with pytest.raises(ValueError, match=r"stage=0.*does not learn"):
        Fabric(accelerator="cpu", strategy=DeepSpeedStrategy(0), precision="16-true")
    with pytest.raises(ValueError, match=r'\["bf16"\]\["enabled"\] is False'):
        strategy = DeepSpeedStrategy(2, {"bf16": {"enabled": False}})
        Fabric(accelerator="cpu", strategy=strategy, precision=DeepSpeedPrecision("bf16-true"))


def refusals() -> None:
    fabric = Fabric(accelerator="cpu", strategy="deepspeed", precision="16-mixed")
    model = Net()
    params = list(model.parameters())
    used = torch.optim.SGD(params, lr=1.0, momentum=0.9)
    params[0].grad = torch.zeros_like(params[0])
    used.step()
    cases: list[tuple[Any, str]] = [
        (lambda: fabric.setup(model, torch.optim.SGD(params[:1]), torch.optim.SGD(params[1:])), "one optimizer"),
        (lambda: fabric.setup(model, torch.optim.LBFGS(params)), "LBFGS"),
        (lambda: fabric.setup(model, torch.optim.SGD(Net().parameters())), "another model"),
        (lambda: fabric.setup(model, used), "has state"),
        (lambda: fabric.setup_optimizers(torch.optim.SGD(params)), "together"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
        assert not is_overridden(model, "forward")
    loss = model(torch.ones(2, 4), extra=torch.ones(3))[1]
    with pytest.raises(RuntimeError, match=r"fabric\.setup"):
        fabric.backward(loss)
    optimizer = torch.optim.SGD(params, lr=1.0)
    fabric.setup(model, optimizer)
    with pytest.raises(ValueError, match="one model"):
        other = Net()
        fabric.setup(other, torch.optim.SGD(other.parameters()))
    with pytest.raises(RuntimeError, match="before any backward"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="no gradients"):
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
    output, loss = model(torch.ones(2, 4), extra=torch.ones(3))
    with pytest.raises(ValueError, match="one value"):
        fabric.backward(output)
    with pytest.raises(ValueError, match="second-order"):
        fabric.backward(loss, create_graph=True)
    fabric.backward(loss + 0 * output.sum(), retain_graph=True)
    with pytest.raises(ValueError, match="2-norm"):
        fabric.clip_gradients(model, optimizer, max_norm=1.0, norm_type=1.0)
    fabric.clip_gradients(model, optimizer, max_norm=1.0)
    with pytest.raises(RuntimeError, match=r"once, after the last backward"):
        fabric.backward(loss + 0 * output.sum())
    with pytest.raises(ValueError, match="no arguments"):
        optimizer.step(grad_scaler=1)  # type: ignore[call-overload]
    optimizer.step()
    assert fabric.precision_plugin.steps == 1


def test_what_the_engine_cannot_do_is_refused_and_leaves_nothing_behind() -> None:
    run_in_ranks(1, refusals)
