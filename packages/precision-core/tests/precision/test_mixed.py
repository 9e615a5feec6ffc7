"""MixedPrecision: what autocast computes in, the user's scaler, refusals, state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import LBFGS, SGD, Adam

from precision_core import Fabric, MixedPrecision, Policy
from precision_core.hardware import is_available

NO_CUDA = pytest.mark.skipif(is_available("cuda"), reason="is about a machine without CUDA")


def train(plugin: MixedPrecision, gradients: list[float], lr: float = 1.0) -> nn.Parameter:
    param = nn.Parameter(torch.zeros(1))
    optimizer = SGD([param], lr=lr)
    for gradient in gradients:
        optimizer.zero_grad()
        plugin.backward(plugin.pre_backward((param * gradient).sum(), None), None)
        plugin.optimizer_step(optimizer, None, None)
    return param


@pytest.mark.parametrize(("mode", "dtype"), [("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)])
def test_products_are_in_compute_dtype_and_the_rest_in_float32(mode: str, dtype: torch.dtype) -> None:
    plugin = MixedPrecision(mode, device="cpu")
    model = plugin.convert_module(nn.Linear(8, 8))
    x = torch.randn(4, 8)
    assert plugin.convert_input(x) is x
    with plugin.forward_context():
        inside = model(x)
    assert inside.dtype is dtype
    output = plugin.convert_output(inside)
    assert output.dtype is torch.float32
    by_hand = (x.to(dtype) @ model.weight.to(dtype).T + model.bias.to(dtype)).float()
    assert torch.allclose(output, by_hand, rtol=0, atol=2e-2)
    plugin.pre_backward(output.sum(), model).backward()
    assert model.weight.grad is not None and model.weight.grad.dtype is torch.float32


def test_int_alias_and_policies_are_modes() -> None:
    assert MixedPrecision(16, device="cpu").policy == Policy.parse("16-mixed")
    assert MixedPrecision("params=float32,compute=bfloat16", device="cpu").policy == Policy.parse("bf16-mixed")
    for mode in ("32-true", "bf16-true", 32, "params=float64,compute=bfloat16"):
        with pytest.raises(ValueError, match=r"MixedPrecision|cannot run here"):
            MixedPrecision(mode, device="cpu")


# ---------------------------------------------------------------- the user's scaler


def test_the_given_scaler_is_the_one_used() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_factor=3.0, backoff_factor=0.25, growth_interval=3)
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    assert plugin.setup_scaler() is scaler
    param = train(plugin, [float("nan")])
    assert (param.item(), scaler.get_scale()) == (0.0, 16.0)  # 64 * 0.25
    train(plugin, [1.0, 1.0])
    assert scaler.get_scale() == 16.0
    assert train(plugin, [1.0]).item() == -1.0
    assert scaler.get_scale() == 48.0  # * 3 after 3 good steps
    assert (plugin.steps, plugin.skipped_steps, plugin.scale) == (3, 1, 48.0)


def test_a_dict_of_its_four_values_does_the_same() -> None:
    options = {"init_scale": 64.0, "growth_factor": 3.0, "backoff_factor": 0.25, "growth_interval": 3}
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=options)
    train(plugin, [float("inf"), 1.0, 1.0, 1.0])
    assert plugin.setup_scaler().get_scale() == 48.0


def test_the_default_scaler_has_torchs_own_values() -> None:
    scaler = MixedPrecision("16-mixed", device="cpu").setup_scaler()
    assert scaler.state_dict() == torch.amp.GradScaler("cpu").state_dict()
    assert not MixedPrecision("bf16-mixed", device="cpu").setup_scaler().is_enabled()


@pytest.mark.parametrize(
    ("scaler", "message"),
    [
        ({"init_scal": 2.0}, "unknown .*init_scal"),
        ({"growth_factor": 0.5}, "growth factor must be > 1"),
        ({"backoff_factor": 2.0}, "backoff factor must be < 1"),
        ("dynamic", "expected a torch.amp.GradScaler or a dict"),
        (GradScaler("cpu", enabled=False), "enabled=False"),
    ],
)
def test_bad_scalers(scaler: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixedPrecision("16-mixed", device="cpu", scaler=scaler)


def test_bf16_refuses_a_scaler() -> None:
    with pytest.raises(ValueError, match="does not scale the loss"):
        MixedPrecision("bf16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu"))


@NO_CUDA
def test_a_scaler_that_torch_disabled_is_refused() -> None:
    with pytest.warns(UserWarning, match="CUDA is not available"):
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    with pytest.raises(ValueError, match=r"disabled it and dropped its values.*torch\.amp\.GradScaler\(\"cpu\""):
        MixedPrecision("16-mixed", scaler=scaler)


@NO_CUDA
def test_without_the_device_construction_works_and_use_is_refused() -> None:
    plugin = MixedPrecision()
    assert (str(plugin.policy), plugin.device_type) == ("16-mixed", "cuda")
    for use in (plugin.setup_scaler, plugin.forward_context, lambda: Fabric(accelerator="cpu", precision=plugin)):
        with pytest.raises(ValueError, match='device="cpu"'):
            use()


def test_unknown_device() -> None:
    with pytest.raises(ValueError, match="expected a device type"):
        MixedPrecision(device="gpu")


def test_scale_false_runs_float16_without_a_scaler() -> None:
    plugin = MixedPrecision("params=float32,compute=float16,scale=false", device="cpu")
    assert (plugin.scale, plugin.setup_scaler().is_enabled()) == (1.0, False)
    assert train(plugin, [0.5]).item() == -0.5


# ---------------------------------------------------------------- parameters that are not float32


def half_model() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].to(torch.float16)
    return model


def test_trainable_half_parameters_are_refused_by_name() -> None:
    for mode in ("16-mixed", "bf16-mixed"):
        with pytest.raises(ValueError, match=r"1\.weight \(float16\), 1\.bias \(float16\).*upcast=True"):
            MixedPrecision(mode, device="cpu").convert_module(half_model())


def test_upcast_casts_them() -> None:
    model = half_model()
    plugin = MixedPrecision("16-mixed", device="cpu", upcast=True)
    plugin.convert_module(model)
    assert {param.dtype for param in model.parameters()} == {torch.float32}
    assert [item.name for item in plugin.report.converted] == ["1.weight", "1.bias"]


def test_upcast_leaves_no_norm_with_two_dtypes() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)).half()
    model.requires_grad_(False)
    model[1].weight.requires_grad_(True)
    model[0].bias.requires_grad_(True)  # the frozen matrix beside it stays: autocast casts it
    plugin = MixedPrecision("16-mixed", device="cpu", upcast=True)
    plugin.convert_module(model)
    dtypes = {name: param.dtype for name, param in model.named_parameters()}
    assert dtypes.pop("0.weight") is torch.float16 and set(dtypes.values()) == {torch.float32}
    with plugin.forward_context():
        assert model(torch.ones(1, 2)).isfinite().all()


def test_frozen_ones_stay_and_are_reported() -> None:
    model = half_model()
    model[1].requires_grad_(False)
    plugin = MixedPrecision("bf16-mixed", device="cpu")
    plugin.convert_module(model)
    assert model[1].weight.dtype is torch.float16
    assert [tuple(item) for item in plugin.report.skipped] == [
        ("1.weight", "frozen, stays float16"),
        ("1.bias", "frozen, stays float16"),
    ]


# ---------------------------------------------------------------- the step


def test_a_closure_runs_once_and_its_result_comes_back_unscaled() -> None:
    plugin = MixedPrecision("16-mixed", device="cpu")
    param = nn.Parameter(torch.ones(1))
    optimizer = SGD([param], lr=1.0)
    for factor, expected in ((3.0, -2.0), (float("inf"), -2.0)):
        calls = []

        def closure(factor: float = factor, calls: list[int] = calls) -> torch.Tensor:
            calls.append(1)
            optimizer.zero_grad()
            loss = (param * factor).sum()
            plugin.backward(plugin.pre_backward(loss, None), None)
            return loss

        before = param.item()
        result = plugin.optimizer_step(optimizer, None, closure)
        assert len(calls) == 1
        assert result.item() == before * factor
        assert param.item() == expected


def test_lbfgs_is_refused_at_registration_and_at_the_step() -> None:
    plugin = MixedPrecision("16-mixed", device="cpu")
    optimizer = LBFGS([nn.Parameter(torch.ones(1))])
    for call in (
        lambda: plugin.register_optimizers(optimizer),
        lambda: plugin.optimizer_step(optimizer, None, lambda: torch.zeros(())),
    ):
        with pytest.raises(ValueError, match="LBFGS evaluates the loss several times"):
            call()


def test_one_parameter_in_two_optimizers_is_refused() -> None:
    plugin, param = MixedPrecision("16-mixed", device="cpu"), nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="Adam and SGD hold the same parameter"):
        plugin.register_optimizers(SGD([param], lr=1.0), Adam([param]))


def test_plain_backward_is_noticed() -> None:
    plugin, param = MixedPrecision("16-mixed", device="cpu"), nn.Parameter(torch.ones(1))
    optimizer = SGD([param], lr=1.0)
    with pytest.raises(RuntimeError, match="before any backward"):
        plugin.optimizer_step(optimizer, None, None)
    (param * 2).sum().backward()
    for call in (
        lambda: plugin.optimizer_step(optimizer, None, None),
        lambda: plugin.unscale_gradients(optimizer),
        lambda: plugin.clip_gradients(None, optimizer, max_norm=1.0),
    ):
        with pytest.raises(RuntimeError, match=r"Call fabric\.backward\(loss\) instead of loss\.backward\(\)"):
            call()
    optimizer.zero_grad()
    plugin.pre_backward((param * 2).sum(), None).backward()
    plugin.optimizer_step(optimizer, None, None)
    (param * 2).sum().backward()  # from the second step on too
    with pytest.raises(RuntimeError, match="come from no scaled loss"):
        plugin.optimizer_step(optimizer, None, None)
    assert param.item() == -1.0


def test_no_gradients_is_no_step() -> None:
    plugin, param = MixedPrecision("16-mixed", device="cpu"), nn.Parameter(torch.ones(1))
    used = train(plugin, [1.0])
    assert plugin.optimizer_step(SGD([param], lr=1.0), None, None) is None
    assert (used.item(), param.item(), plugin.steps) == (-1.0, 1.0, 1)


def test_pre_backward_scales_and_post_backward_gives_the_loss_back() -> None:
    plugin, param = MixedPrecision("16-mixed", device="cpu", scaler={"init_scale": 3.0}), nn.Parameter(torch.ones(1))
    first, second = (param * 0.1).sum(), (param * 0.7).sum()
    scaled = [plugin.pre_backward(first, None), plugin.pre_backward(second, None)]
    assert scaled[0].item() == pytest.approx(0.3)
    assert plugin.post_backward(scaled[1], None) is second
    assert plugin.post_backward(scaled[0], None).item() == pytest.approx(0.1)


# ---------------------------------------------------------------- limits


def test_too_many_skips_in_a_row_name_the_parameters() -> None:
    plugin = MixedPrecision("16-mixed", device="cpu", max_skips=3)
    model = plugin.convert_module(nn.ParameterDict({"good": torch.ones(1), "bad": torch.ones(1)}))
    optimizer = SGD(model.parameters(), lr=1.0)

    def step(bad: float) -> None:
        optimizer.zero_grad()
        plugin.pre_backward((model["good"] + model["bad"] * bad).sum(), model).backward()
        plugin.optimizer_step(optimizer, model, None)

    for bad in (float("nan"), float("nan"), 1.0, float("nan"), float("nan")):
        step(bad)
    assert (plugin.skipped_steps, plugin.steps) == (4, 1)
    with pytest.raises(FloatingPointError, match=r"3 optimizer steps in a row.*gradients of bad\. Look"):
        step(float("nan"))
    with pytest.raises(FloatingPointError, match="3 optimizer steps in a row"):
        _ = plugin.skipped_steps


def test_the_scale_stops_at_its_minimum() -> None:
    plugin = MixedPrecision("16-mixed", device="cpu", scaler={"init_scale": 4.0}, min_scale=1.5)
    train(plugin, [float("inf")] * 5)
    assert plugin.scale == 1.5
    low = MixedPrecision("16-mixed", device="cpu", scaler={"init_scale": 1.0}, min_scale=1.5)
    train(low, [float("inf")] * 2)
    assert low.scale == 1.0  # started below: it stays there


# ---------------------------------------------------------------- state


def test_state_round_trip_with_every_field_off_its_default() -> None:
    options = {"init_scale": 64.0, "growth_factor": 3.0, "backoff_factor": 0.25, "growth_interval": 5}
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=options)
    train(plugin, [float("inf"), 1.0, 1.0, float("inf")])
    state = plugin.state_dict()
    assert state == {
        "version": 1,
        "mode": "16-mixed",
        "scaler": {
            "scale": 4.0,
            "growth_factor": 3.0,
            "backoff_factor": 0.25,
            "growth_interval": 5,
            "_growth_tracker": 0,
        },
        "steps": 2,
        "skipped_steps": 2,
        "skipped_in_a_row": 1,
        "last_step_skipped": 1,
    }
    train(plugin, [1.0])
    state = plugin.state_dict()
    for used in (False, True):
        other = MixedPrecision("16-mixed", device="cpu")
        if used:
            train(other, [1.0])
        other.load_state_dict(copy.deepcopy(state))
        assert other.state_dict() == state
        train(other, [1.0] * 4)
        assert other.scale == 12.0  # one good step was in the state, the fifth grows it


def test_state_into_another_mode(caplog: pytest.LogCaptureFixture) -> None:
    scaled, unscaled = MixedPrecision("16-mixed", device="cpu"), MixedPrecision("bf16-mixed", device="cpu")
    train(scaled, [float("inf"), 1.0])
    unscaled.load_state_dict(scaled.state_dict())
    assert (unscaled.steps, unscaled.skipped_steps, unscaled.scale) == (1, 1, 1.0)
    assert "the loss scale was left out" in unscaled.report.notes[-1] and "left out" in caplog.text
    fresh = MixedPrecision("16-mixed", device="cpu")
    fresh.load_state_dict(unscaled.state_dict())
    assert (fresh.steps, fresh.scale) == (1, 2.0**16)
    assert "stays at its start" in fresh.report.notes[-1]


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {},
        lambda state: {**state, "version": 2},
        lambda state: {**state, "steps": -1},
        lambda state: {**state, "steps": "3"},
        lambda state: {**state, "scaler": {**state["scaler"], "scale": float("nan")}},
        lambda state: {**state, "scaler": {**state["scaler"], "scale": "big"}},
        lambda state: {**state, "scaler": {"scale": 2.0}},
        lambda state: [state],
        lambda state: None,
    ],
)
def test_garbage_state_changes_nothing(change: Any) -> None:
    plugin = MixedPrecision("16-mixed", device="cpu")
    train(plugin, [1.0, float("inf")])
    before = plugin.state_dict()
    with pytest.raises(ValueError, match="state"):
        plugin.load_state_dict(change(plugin.state_dict()))
    assert plugin.state_dict() == before


def test_loading_a_scale_rescales_gradients_that_are_held() -> None:
    plugin, param = MixedPrecision("16-mixed", device="cpu", scaler={"init_scale": 8.0}), nn.Parameter(torch.zeros(1))
    optimizer = SGD([param], lr=1.0)
    plugin.register_optimizers(optimizer)
    plugin.pre_backward((param * 3.0).sum(), None).backward()
    state = plugin.state_dict()
    state["scaler"]["scale"] = 32.0
    plugin.load_state_dict(state)
    plugin.optimizer_step(optimizer, None, None)
    assert param.item() == -3.0


class Dates(nn.Module):
    """As it comes from numpy: float64 features, and timestamps that no narrower dtype holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.convolution, self.weight = nn.Linear(4, 2), nn.Conv1d(1, 2, 1), nn.Parameter(torch.ones(4, 2))
        self.register_buffer("mean", torch.full((4,), 0.5, dtype=torch.float64))
        self.register_buffer("phase", torch.tensor([1j], dtype=torch.complex128))

    def forward(self, x: torch.Tensor, when: torch.Tensor) -> dict[str, torch.Tensor]:
        x = x - self.mean
        return {"y": self.layer(x), "z": self.convolution(x[:, None]), "w": x @ self.weight, "when": when}


@pytest.mark.parametrize("mode", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: torch.from_numpy(x.numpy())], ids=["torch", "numpy"])
def test_float64_batches_run_and_timestamps_keep_their_values(mode: str, wrap: Any) -> None:
    torch.manual_seed(0)
    plain = Dates()
    model = Fabric(accelerator="cpu", precision=mode).setup(copy.deepcopy(plain))
    assert (model.mean.dtype, model.phase.dtype) == (torch.float32, torch.complex64)
    x, when = (
        torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4),
        torch.tensor([1.7e9 + 0.123], dtype=torch.float64),
    )
    output = model(wrap(x), when=when)
    assert output["when"] is when
    exact = plain.double()(x, when)
    for key in "yzw":
        assert output[key].dtype is torch.float32 and torch.allclose(output[key].double(), exact[key], atol=0.02)
    sum(output[key].sum() for key in "yzw").backward()
    assert {param.grad.dtype for param in model.parameters()} == {torch.float32}
