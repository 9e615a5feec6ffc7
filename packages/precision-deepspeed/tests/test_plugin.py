"""The plugin alone: what its policy says, what it refuses, and its state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from precision_core import Fabric, supports
from precision_core.testing import PrecisionContract, run_in_ranks
from precision_deepspeed import DeepSpeedPrecision, DeepSpeedStrategy

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.usefixtures("float16_accelerator")
@pytest.mark.parametrize(
    ("mode", "params", "compute", "reduce", "master", "scale"),
    [
        ("32-true", FLOAT32, FLOAT32, FLOAT32, None, False),
        ("bf16-mixed", FLOAT32, BFLOAT16, FLOAT32, None, False),
        (16, FLOAT32, FLOAT16, FLOAT32, None, True),
        ("bf16-true", BFLOAT16, BFLOAT16, BFLOAT16, FLOAT32, False),
        ("params=bfloat16,reduce=float32", BFLOAT16, BFLOAT16, FLOAT32, FLOAT32, False),
        ("16-true", FLOAT16, FLOAT16, FLOAT16, FLOAT32, True),
        ("16-master", FLOAT16, FLOAT16, FLOAT32, FLOAT32, True),
    ],
)
def test_the_policy_says_what_the_engine_makes_of_the_mode(
    mode: Any, params: torch.dtype, compute: torch.dtype, reduce: torch.dtype, master: torch.dtype | None, scale: bool
) -> None:
    policy = DeepSpeedPrecision(mode).policy
    assert (policy.params, policy.compute, policy.reduce) == (params, compute, reduce)
    assert (policy.master, policy.scale) == (master, scale)
    assert policy.output is torch.float32


def test_pure_bfloat16_state_is_in_the_policy() -> None:
    options = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    strategy = DeepSpeedStrategy(2, {"bf16": options})
    strategy.device = torch.device("cpu")
    plugin = DeepSpeedPrecision("bf16-true")
    plugin.connect(strategy)
    assert plugin.policy.master is None and plugin.mode == "bf16-true"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"precision": "64-true"}, ["float64", "32-true"]),
        ({"precision": "bf16-mixed; *.norm: 32-true"}, ["exceptions"]),
        ({"precision": "params=float32,compute=bfloat16,reduce=bfloat16"}, ["reduce=float32"]),
        ({"precision": "params=bfloat16,compute=float16"}, ["float32 parameters"]),
        ({"precision": "params=bfloat16,scale=true"}, ["scale=false"]),
        ({"precision": "params=float32,reduce=bfloat16"}, ["float32"]),
        ({"precision": "half"}, ["no mode"]),
        ({"amp_type": "apex"}, ["0.19.8", "native"]),
        ({"amp_type": "apex", "amp_level": "O2"}, ["0.19.8", "native"]),
        ({"amp_type": "nvidia"}, ["native"]),
        ({"amp_level": "O1"}, ["apex", "O1"]),
        ({"precision": "bf16-mixed", "scaler": {"init_scale": 4.0}}, ["16-mixed"]),
    ],
)
def test_what_it_does_not_run_is_refused(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        DeepSpeedPrecision(**arguments)
    assert all(word in str(caught.value) for word in words)


def test_float16_is_refused_where_deepspeeds_accelerator_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: False)
    with pytest.raises(ValueError) as caught:
        DeepSpeedPrecision("16-true")
    assert all(word in str(caught.value) for word in ["float16", "16-mixed", "bf16-true"])
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    assert DeepSpeedPrecision("16-true").policy.params is torch.float16


@pytest.mark.parametrize("options", [{"init_scale": 0.0}, {"growth_factor": 1.0}, {"backoff_factor": 2.0}])
def test_a_scaler_that_cannot_work_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="scale"):
        _ = DeepSpeedPrecision("16-mixed", scaler=options).scaler


def test_it_needs_its_strategy_and_the_strategy_it() -> None:
    with pytest.raises(ValueError, match=r'strategy="deepspeed"'):
        Fabric(accelerator="cpu", precision=DeepSpeedPrecision("bf16-mixed"))
    from precision_core import MixedPrecision

    with pytest.raises(ValueError, match="DeepSpeedPrecision"):
        Fabric(accelerator="cpu", strategy="deepspeed", precision=MixedPrecision("bf16-mixed", device="cpu"))


def test_support_rows() -> None:
    assert supports("bf16-mixed", "cpu", "deepspeed")
    assert "float64" in supports("64-true", "cpu", "deepspeed").reason and not supports("64-true", "cpu", "deepspeed")
    from precision_deepspeed.vendor import supports_float16

    for mode in ("16-true", "16-master"):
        assert bool(supports(mode, "cpu", "deepspeed")) == supports_float16()
    assert supports("16-mixed", "cpu", "deepspeed") and supports("16-true", "cpu")


def test_the_scale_follows_torchs_rule() -> None:
    options: dict[str, Any] = {"init_scale": 1024.0, "growth_factor": 3.0, "backoff_factor": 0.25, "growth_interval": 2}
    mine = DeepSpeedPrecision("16-mixed", scaler=options).scaler
    theirs = torch.amp.GradScaler("cpu", **options)
    theirs.scale(torch.ones(()))
    for skipped in (False, False, True, False, True, True, False, False, False, False, False):
        mine.stepped(skipped)
        torch._amp_update_scale_(theirs._scale, theirs._growth_tracker, torch.tensor(float(skipped)), 3.0, 0.25, 2)
        assert mine.state_dict() == theirs.state_dict()
    assert (mine.counter.steps, mine.counter.skipped) == (8, 3)


@pytest.mark.parametrize(
    ("mode", "scale", "says"),
    [
        ("16-mixed", 2.0**-14, r'skipped, the loss scale is 6\.10352e-05: inf .* precision="bf16-mixed", which .*'),
        ("bf16-mixed", 1.0, r"skipped: inf or NaN .*; lower the learning rate"),  # ZeRO skips in each mode
    ],
)
def test_fifty_skips_in_a_row_are_an_error(mode: str, scale: float, says: str) -> None:
    scaler = DeepSpeedPrecision(mode).scaler
    for _ in range(49):
        scaler.stepped(True)
    assert scaler.factor == scale
    with pytest.raises(FloatingPointError, match=rf"^50 optimizer steps in a row were {says} \[no-finite-gradients\]$"):
        scaler.stepped(True)


@pytest.mark.usefixtures("float16_accelerator")
def test_state_survives_a_round_trip_with_every_field_off_its_default() -> None:
    for mode, state in (
        (
            "16-mixed",
            {"scale": 8.0, "growth_factor": 4.0, "backoff_factor": 0.25, "growth_interval": 7, "_growth_tracker": 3},
        ),
        ("16-true", {"scale": 8.0, "iteration": 5, "last_overflow": 3, "hysteresis": 1}),
    ):
        plugin = DeepSpeedPrecision(mode)
        counts = {"steps": 5, "skipped_steps": 3, "skipped_in_a_row": 2, "last_step_skipped": 1}
        plugin.load_state_dict({"version": 1, "mode": mode, "scaler": state, **counts})
        assert plugin.state_dict() == {"version": 1, "mode": mode, "scaler": state, **counts}
        assert (plugin.scale, plugin.steps, plugin.skipped_steps, plugin.last_step_skipped) == (8.0, 5, 3, True)
        for wrong in ({"scale": "much"}, {"scale": float("nan")}, {"scale": -1.0}):
            with pytest.raises(ValueError, match="not the state of a loss scaler"):
                plugin.scaler.load_state_dict(wrong)


def test_what_the_engine_does_is_not_done_twice() -> None:
    scaler, optimizer = DeepSpeedPrecision("16-mixed").scaler, torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(RuntimeError, match="safe_get_full_grad"):
        scaler.unscale(optimizer)
    with pytest.raises(RuntimeError, match=r"engine.step"):
        scaler.step(optimizer, None, str)


class Marked(nn.Module):
    _keep_in_fp32_modules_strict = ("head.weight",)

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.register_buffer("table", torch.linspace(0, 1, 4).sin(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(x) + self.table) + self.table)


def test_buffers_stay_wide_by_cores_table_and_parameters_are_named_that_the_engine_casts() -> None:
    torch.manual_seed(0)
    plugin, model, x = DeepSpeedPrecision("bf16-true"), Marked(), torch.randn(8, 4)
    exact = copy.deepcopy(model).double()(x.double())
    with pytest.warns(UserWarning, match=r"DeepSpeedPrecision stores all parameters in bfloat16, .*: head\.weight\."):
        plugin.convert_module(model)
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    assert model.table.dtype is model.norm.running_mean.dtype is torch.float32
    with plugin.forward_context():
        output = model(plugin.convert_input(x))
    assert (output.double() - exact).abs().max() < 0.05 and model.norm.running_mean.any()


def by_hand() -> list[float]:
    import deepspeed

    from precision_deepspeed import deepspeed_config

    torch.distributed.init_process_group("gloo")
    plugin = DeepSpeedPrecision("bf16-true")
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plugin.convert_module(model)
    config = deepspeed_config(plugin.policy, {"zero_optimization": {"stage": 2}})
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    losses = []
    for _ in range(3):
        with plugin.forward_context():
            output = plugin.convert_output(engine(plugin.convert_input(torch.ones(3, 4))))
        loss = output.pow(2).mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def through_fabric() -> list[float]:
    fabric = Fabric(accelerator="cpu", strategy="deepspeed", precision="bf16-true")
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    losses = []
    for _ in range(3):
        loss = model(torch.ones(3, 4)).pow(2).mean()
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_loop_by_hand_equals_fabric() -> None:
    assert run_in_ranks(1, by_hand) == run_in_ranks(1, through_fabric)


# -------------------------------------------------------------------- the contract


class TestDeepSpeedPrecision(PrecisionContract):
    """Under an engine at stage 0, whose parameters are torch's: the plugin alone has no loop, the engine steps."""

    def make_precision(self) -> DeepSpeedPrecision:
        return DeepSpeedPrecision("16-mixed")

    def make_fabric(self) -> Fabric:
        return Fabric(accelerator="cpu", strategy=DeepSpeedStrategy(0), precision=self.make_precision())

    def run(self, check: Callable[..., None], *args: Any) -> None:
        run_in_ranks(1, check, self, *args)

    @pytest.mark.xfail(reason="DeepSpeed's engine steps one optimizer; several are refused", strict=True)
    def test_two_optimizers_step_like_one(self) -> None:
        super().test_two_optimizers_step_like_one()

    @pytest.mark.xfail(
        reason="DeepSpeed's engine runs backward, clips and steps: those hooks are not called", strict=True
    )
    def test_hooks_run_in_order(self) -> None:
        super().test_hooks_run_in_order()

    @pytest.mark.xfail(reason="a loop by hand is one around deepspeed.initialize", strict=True)
    def test_a_loop_by_hand_equals_fabric(self) -> None:
        super().test_a_loop_by_hand_equals_fabric()

    @pytest.mark.xfail(reason="true gradients are DeepSpeed's safe_get_full_grad; the error says so", strict=True)
    def test_gradients_are_unscaled_once_they_are_asked_for(self) -> None:
        super().test_gradients_are_unscaled_once_they_are_asked_for()
