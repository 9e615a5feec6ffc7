"""Half state, updates, accumulated and reduced gradients: found where nobody asked, info where somebody did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planted import AUTOCAST, audited, found, mlp, train
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from precision_core import Fabric
from precision_core.testing import run_in_ranks
from precision_lab.auditing.report import Report

HALF = torch.bfloat16


def batch(dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.randn(8, 16).to(dtype)


def quiet(report: Report) -> None:
    assert not report.at("warning"), report.findings


# ------------------------------------------------------------------ optimizer state


def test_moments_in_bfloat16_are_found_with_the_line_of_the_cast() -> None:
    def run() -> None:
        model = mlp()
        model.bfloat16()
        train(model, batch())

    finding = found(audited(run), "half-optimizer-state")
    assert finding.level == "warning" and finding.line is not None and finding.line.text == "model.bfloat16()"
    assert "AdamW keeps exp_avg, exp_avg_sq in bfloat16 for all 6 parameters" in finding.what
    assert 'Fabric(precision="bf16-master")' in finding.remedy.ours


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda params: torch.optim.RMSprop(params, lr=1e-2), "square_avg"),
        (lambda params: torch.optim.SGD(params, lr=1e-1, momentum=0.9), "momentum_buffer"),
        (lambda params: torch.optim.Adam(params, lr=1e-2, foreach=False), "exp_avg"),
    ],
    ids=["RMSprop", "SGD", "Adam"],
)
def test_other_optimizers_keep_other_states(make: Any, key: str) -> None:
    model = mlp().to(HALF)
    finding = found(audited(lambda: train(model, batch(), optimizer=make(model.parameters()))), "half-optimizer-state")
    assert key in finding.what


def test_parameters_that_alone_are_half_are_named() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(16, 16)
            self.body = mlp().to(HALF)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(self.wide(x).to(HALF))

    finding = found(audited(lambda: train(Mixed(), batch(torch.float32))), "half-optimizer-state")
    assert finding.module == "body" and "6 of 8 parameters" in finding.what


def test_parameters_that_are_made_in_half_have_their_line() -> None:
    def run() -> None:
        model = nn.Linear(16, 4, dtype=HALF)
        train(model, batch())

    finding = found(audited(run), "half-optimizer-state")
    assert finding.line is not None and finding.line.text == "model = nn.Linear(16, 4, dtype=HALF)"


def test_sgd_without_momentum_keeps_nothing() -> None:
    model = mlp().to(HALF)
    report = audited(lambda: train(model, batch(), optimizer=torch.optim.SGD(model.parameters(), lr=1.0)))
    assert "half-optimizer-state" not in [each.code for each in report.findings]


@pytest.mark.parametrize("mode", ["bf16-true", "bf16-stochastic", "bf16-master", "bf16-mixed", "32-true"])
def test_what_our_fabric_was_asked_for_is_at_most_info(mode: str) -> None:
    def run() -> None:
        fabric = Fabric(accelerator="cpu", precision=mode)
        model = mlp()
        model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-4))
        for _ in range(2):
            for _ in range(2):
                fabric.backward(model(batch(torch.float32)).pow(2).mean())
            optimizer.step()
            optimizer.zero_grad()

    report = audited(run)
    quiet(report)
    codes = {each.code for each in report.findings}
    assert ("half-optimizer-state" in codes) == (mode in ("bf16-true", "bf16-stochastic"))
    assert ("updates-round-to-nothing" in codes) == (mode == "bf16-true")


def test_float32_parameters_under_autocast_are_right() -> None:
    quiet(audited(lambda: train(mlp(), batch(torch.float32), context=AUTOCAST, micro_batches=2)))


# ------------------------------------------------------------------ float16


def test_a_second_moment_of_zeros_in_float16_is_an_error() -> None:
    model = mlp().half()

    def tiny(output: torch.Tensor) -> torch.Tensor:
        return output.float().mean() * 1e-3

    report = audited(lambda: train(model, batch(torch.float16), loss=tiny, steps=1))
    finding = found(report, "float16-state")
    assert finding.level == "error" and "of exp_avg_sq in float16 are zero" in finding.what


def test_what_is_nan_already_is_said() -> None:
    model = mlp().half()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def tiny(output: torch.Tensor) -> torch.Tensor:
        return output.float().mean() * 1e-3

    finding = found(
        audited(lambda: train(model, batch(torch.float16), loss=tiny, optimizer=optimizer, steps=3)), "float16-state"
    )
    assert "inf or NaN already" in finding.what


def test_a_second_moment_of_bfloat16_does_not_vanish() -> None:
    report = audited(lambda: train(mlp().to(HALF), batch(), loss=lambda output: output.float().mean() * 1e-3))
    assert "float16-state" not in [each.code for each in report.findings]


# ------------------------------------------------------------------ updates


def test_updates_that_round_to_nothing_are_counted() -> None:
    model = mlp().to(HALF)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    finding = found(audited(lambda: train(model, batch(), optimizer=optimizer)), "updates-round-to-nothing")
    assert finding.level == "warning" and "100%" in finding.what
    assert finding.line is not None and finding.line.text == "optimizer.step()"


def test_one_layer_with_large_weights_is_named() -> None:
    model = mlp().to(HALF)
    with torch.no_grad():
        model[0].weight.mul_(1000)
    finding = found(audited(lambda: train(model, batch())), "updates-round-to-nothing")
    assert finding.module == "0" and "most in 0.weight" in finding.what


def test_steps_that_are_large_enough_are_right() -> None:
    model = mlp().to(HALF)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-2)
    report = audited(lambda: train(model, batch(), optimizer=optimizer))
    assert "updates-round-to-nothing" not in [each.code for each in report.findings]


def test_a_learning_rate_of_zero_rounds_nothing() -> None:
    model = mlp().to(HALF)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    report = audited(lambda: train(model, batch(), optimizer=optimizer))
    assert "updates-round-to-nothing" not in [each.code for each in report.findings]


# ------------------------------------------------------------------ accumulation


@pytest.mark.parametrize("count", [2, 4])
def test_micro_batches_added_up_in_half_are_counted(count: int) -> None:
    model = mlp().to(HALF)
    finding = found(audited(lambda: train(model, batch(), micro_batches=count)), "half-accumulation")
    assert finding.level == "warning" and f"gradients of {count} micro-batches" in finding.what
    assert finding.line is not None and finding.line.text == "loss(output).backward()"


def test_one_backward_a_step_accumulates_nothing() -> None:
    report = audited(lambda: train(mlp().to(HALF), batch()))
    assert "half-accumulation" not in [each.code for each in report.findings]


# ------------------------------------------------------------------ reduction


def sharded(reduce: torch.dtype | None) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=HALF, reduce_dtype=reduce)
    return fully_shard(mlp(), mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)), mp_policy=policy)


def compressed() -> nn.Module:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    model = DistributedDataParallel(mlp())
    model.register_comm_hook(None, fp16_compress_hook)
    return model


MODELS: dict[str, Any] = {
    "DDP, half parameters": (lambda: DistributedDataParallel(mlp().to(HALF)), HALF),
    "DDP, hook": (compressed, torch.float32),
    "FSDP2, by default": (lambda: sharded(None), torch.float32),
    "DDP": (lambda: DistributedDataParallel(mlp()), torch.float32),
    "FSDP2, reduce_dtype": (lambda: sharded(torch.float32), torch.float32),
}


def reductions() -> dict[str, list[tuple[str, str, str]]]:
    results = {}
    torch.distributed.init_process_group("gloo")
    for name, (make, dtype) in MODELS.items():
        report = audited(lambda make=make, dtype=dtype: train(make(), batch(dtype)))
        results[name] = [
            (each.level, each.what, each.line.text if each.line else "")
            for each in report.findings
            if each.code == "half-reduction"
        ]
    return results


@pytest.mark.slow_start
def test_gradients_reduced_in_half_over_two_ranks_are_found() -> None:
    results = run_in_ranks(2, reductions)[0]
    (half,), (hook,), (default,) = (results[name] for name in list(MODELS)[:3])
    assert half[0] == hook[0] == default[0] == "warning"
    assert "in bfloat16 (2 calls of allreduce_), as the parameters are half" in half[1]
    assert "in float16" in hook[1] and "by fp16_compress_hook" in hook[1]
    assert hook[2] == "model.register_comm_hook(None, fp16_compress_hook)"
    assert "although the parameters are float32" in default[1]
    assert results["DDP"] == results["FSDP2, reduce_dtype"] == []


# ------------------------------------------------------------------ by hand


def test_parameters_that_are_cast_one_by_one_have_that_line() -> None:
    def run() -> None:
        model = mlp()
        for param in model.parameters():
            param.data = param.data.to(HALF)  # here
        train(model, batch())

    finding = found(audited(run), "half-optimizer-state")
    assert finding.line is not None and finding.line.text.endswith("# here")


def test_a_default_dtype_that_makes_parameters_half_is_its_line() -> None:
    def run() -> None:
        before = torch.get_default_dtype()
        torch.set_default_dtype(HALF)  # here
        model = mlp()
        torch.set_default_dtype(before)
        train(model, batch())

    finding = found(audited(run), "half-optimizer-state")
    assert finding.line is not None and finding.line.text.endswith("# here")


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize("foreach", [False, True])
def test_gradients_that_the_loop_sums_itself(dtype: torch.dtype, foreach: bool) -> None:
    def run() -> None:
        model = nn.Linear(16, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        params = list(model.parameters())
        for _ in range(2):
            sums = [torch.zeros_like(param, dtype=dtype) for param in params]
            for _ in range(3):
                gradients = torch.autograd.grad(model(torch.randn(8, 16)).square().mean(), params)
                if foreach:
                    torch._foreach_add_(sums, [each.to(dtype) for each in gradients])
                    continue
                for total, each in zip(sums, gradients, strict=True):
                    total += each.to(dtype)
            for param, total in zip(params, sums, strict=True):
                param.grad = total.float()
            optimizer.step()

    report = audited(run)
    if dtype is torch.float32:
        quiet(report)
        return
    finding = found(report, "half-accumulation")
    assert finding.level == "warning" and "that the loop sums itself are added up in bfloat16 for 2" in finding.what
    assert finding.line is not None and ("_foreach_add_" if foreach else "total += ") in finding.line.text


def test_a_load_that_makes_parameters_half_is_its_line() -> None:
    state = {name: value.to(HALF) for name, value in mlp().state_dict().items()}

    def run() -> None:
        model = mlp()
        model.load_state_dict(state, assign=True)  # here
        train(model, batch())

    finding = found(audited(run), "half-optimizer-state")
    assert finding.line is not None and finding.line.text.endswith("# here")


class Momentum(torch.optim.Optimizer):
    """Keeps an average of the gradients in a dtype of its own."""

    def __init__(self, params: Any, dtype: torch.dtype) -> None:
        super().__init__(params, {"lr": 0.1})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            state.setdefault("average", torch.zeros_like(param, dtype=self.dtype)).lerp_(param.grad.to(self.dtype), 0.1)
            param.sub_(0.1 * state["average"])


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
def test_half_state_beside_float32_parameters(dtype: torch.dtype) -> None:
    model = nn.Linear(16, 4)
    report = audited(
        lambda: train(model, batch(torch.float32), optimizer=Momentum(model.parameters(), dtype), context=AUTOCAST)
    )
    if dtype is torch.float32:
        quiet(report)
        return
    finding = found(report, "half-optimizer-state")
    assert finding.level == "warning"
    assert "average is kept in bfloat16 for 2 parameters that are float32 (weight, bias)" in finding.what


def test_state_that_the_loop_casts_has_that_line() -> None:
    def run() -> None:
        model = nn.Linear(16, 4)
        optimizer = torch.optim.Adam(model.parameters(), foreach=False)
        train(model, batch(torch.float32), optimizer=optimizer, context=AUTOCAST)
        for state in optimizer.state.values():
            state["exp_avg"] = state["exp_avg"].to(HALF)  # here

    finding = found(audited(run), "half-optimizer-state")
    assert finding.line is not None and finding.line.text.endswith("# here")
