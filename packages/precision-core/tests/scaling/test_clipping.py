"""Clipping: true gradients and true norms, the same as torch's on gradients that were never scaled."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import SGD

from precision_core import Fabric, MixedPrecision, Precision
from precision_core.scaling.loss_scaler import LossScaler

MODES = ("32-true", "16-mixed", "16-mixed on a device that blocks")


def make(mode: str) -> Precision:
    if mode == "32-true":
        return Precision()
    plugin = MixedPrecision("16-mixed", device="cpu")
    avoid_sync = "blocks" in mode  # the CPU can play such a device
    plugin.scaler = LossScaler(plugin.setup_scaler(), min_scale=2.0**-14, max_skips=50, avoid_sync=avoid_sync)
    return plugin


def model_and_twin() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    return model, copy.deepcopy(model)


def backward(plugin: Precision, model: nn.Module, twin: nn.Module, factor: float = 1.0) -> None:
    """Gives both the same true gradients; the model's carry the scale."""
    data = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    plugin.pre_backward(model(data).pow(2).sum() * factor, model).backward()
    (twin(data).pow(2).sum() * factor).backward()


def gradients(model: nn.Module) -> list[Tensor]:
    return [param.grad for param in model.parameters() if param.grad is not None]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("whole_model", [False, True])
@pytest.mark.parametrize(("max_norm", "norm_type"), [(0.1, 2.0), (1e6, 2.0), (0.1, 1.0), (0.1, float("inf"))])
def test_max_norm(mode: str, whole_model: bool, max_norm: float, norm_type: float) -> None:
    plugin, (model, twin) = make(mode), model_and_twin()
    optimizer = SGD([{"params": [param]} for param in model.parameters()], lr=0.1)  # over all groups
    plugin.register_optimizers(optimizer)
    backward(plugin, model, twin)
    norm = plugin.clip_gradients(model, None if whole_model else optimizer, max_norm=max_norm, norm_type=norm_type)
    expected = clip_grad_norm_(twin.parameters(), max_norm, norm_type)
    assert isinstance(norm, Tensor) and torch.allclose(norm, expected, rtol=1e-5)
    for mine, theirs in zip(gradients(model), gradients(twin), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-9)
    plugin.clip_gradients(model, optimizer, max_norm=max_norm / 2, norm_type=norm_type)  # twice: on true gradients
    clip_grad_norm_(twin.parameters(), max_norm / 2, norm_type)
    for mine, theirs in zip(gradients(model), gradients(twin), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_clip_val(mode: str) -> None:
    plugin, (model, twin) = make(mode), model_and_twin()
    optimizer = SGD(model.parameters(), lr=0.1)
    backward(plugin, model, twin)
    assert plugin.clip_gradients(model, optimizer, clip_val=0.05) is None
    clip_grad_value_(twin.parameters(), 0.05)
    assert max(gradient.abs().max().item() for gradient in gradients(model)) == pytest.approx(0.05)
    for mine, theirs in zip(gradients(model), gradients(twin), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_both_or_neither_or_no_number(mode: str) -> None:
    plugin, (model, twin) = make(mode), model_and_twin()
    optimizer = SGD(model.parameters(), lr=0.1)
    backward(plugin, model, twin)
    before = [gradient.clone() for gradient in gradients(model)]
    for arguments, message in (
        ({}, "exactly one of max_norm and clip_val, got neither"),
        ({"max_norm": 1.0, "clip_val": 1.0}, "exactly one of max_norm and clip_val, got both"),
        ({"max_norm": 0.0}, "max_norm=0.0: expected a positive number"),
        ({"clip_val": -1}, "clip_val=-1: expected a positive number"),
        ({"max_norm": float("nan")}, "max_norm=nan: expected a positive number"),
        ({"max_norm": "1"}, "max_norm='1': expected a positive number"),
        ({"max_norm": True}, "max_norm=True: expected a positive number"),
    ):
        with pytest.raises(ValueError, match=message):
            plugin.clip_gradients(model, optimizer, **arguments)
    with pytest.raises(ValueError, match="needs the model, the optimizer, or both"):
        plugin.clip_gradients(None, None, max_norm=1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(model), strict=True))


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("limit", [{"max_norm": 1.0}, {"clip_val": 1.0}])
def test_non_finite_gradients_lead_to_a_skip(mode: str, bad: float, limit: dict[str, float]) -> None:
    plugin, (model, twin) = make(mode), model_and_twin()
    optimizer = SGD(model.parameters(), lr=0.1)
    backward(plugin, model, twin, bad)
    before = [param.detach().clone() for param in model.parameters()]
    norm = plugin.clip_gradients(model, optimizer, **limit)
    assert norm is None or not torch.isfinite(norm)
    plugin.optimizer_step(optimizer, model, None)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert (plugin.steps, plugin.skipped_steps, plugin.last_step_skipped, plugin.scale) == (0, 1, True, 2.0**15)


@pytest.mark.parametrize("mode", MODES)
def test_error_if_nonfinite(mode: str) -> None:
    plugin, (model, twin) = make(mode), model_and_twin()
    optimizer = SGD(model.parameters(), lr=0.1)
    backward(plugin, model, twin, float("nan"))
    with pytest.raises(RuntimeError, match="non-finite"):
        plugin.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=True)


def test_the_norm_of_large_finite_gradients_is_not_an_overflow() -> None:
    """The squares of 1e20 overflow float32; each element is finite, and so is the true norm."""
    plugin, param = make("16-mixed"), nn.Parameter(torch.zeros(2))
    optimizer = SGD([param], lr=1.0)
    plugin.pre_backward((param * torch.tensor([3e16, 4e16])).sum(), None).backward()
    assert param.grad is not None and param.grad.max() > 1e20
    norm = plugin.clip_gradients(None, optimizer, max_norm=1.0)
    assert norm is not None and norm.item() == pytest.approx(5e16)
    plugin.optimizer_step(optimizer, None, None)
    assert torch.allclose(param, torch.tensor([-0.6, -0.8]))
    assert plugin.skipped_steps == 0


def test_parameters_without_gradients() -> None:
    plugin, param = make("16-mixed"), nn.Parameter(torch.zeros(2))
    norm = plugin.clip_gradients(None, SGD([param], lr=1.0), max_norm=1.0)
    assert norm is not None and norm.item() == 0.0


def test_an_optimizer_over_more_than_the_model_is_unscaled_whole() -> None:
    plugin, a, b = make("16-mixed"), nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    optimizer = SGD([*a.parameters(), *b.parameters()], lr=1.0)
    plugin.register_optimizers(optimizer)
    plugin.pre_backward((a.weight * 8.0 + b.weight * 2.0).sum(), None).backward()
    assert plugin.clip_gradients(a, None, max_norm=1.0) == 8.0
    assert a.weight.grad is not None and b.weight.grad is not None
    assert (a.weight.grad.item(), b.weight.grad.item()) == (pytest.approx(1.0), 2.0)


# -------------------------------------------------------------------- norms beyond the dtype's range


@pytest.mark.parametrize(
    ("mode", "values", "norm_type"),
    [
        ("16-true", [1000.0] * 40000, 2.0),
        ("16-true", [1000.0] * 40000, 1.0),
        ("16-true", [6e4] * 3, 2.0),
        ("16-true", [6e4] * 40000, float("inf")),
        ("bf16-true", [0.1] * 1_000_000, 2.0),
        ("bf16-true", [1e30] * 4, 2.0),
        ("bf16-mixed", [1e38] * 100, 2.0),
        ("32-true", [2e38] * 100, 2.0),
        ("32-true", [1e-25] * 100, 2.0),
        ("64-true", [1e300] * 100, 2.0),
    ],
)
@pytest.mark.parametrize("options", [{}, {"foreach": True}])
def test_norms_beyond_the_range_clip_and_do_not_zero(
    mode: str, values: list[float], norm_type: float, options: dict[str, bool]
) -> None:
    fabric = Fabric(accelerator="cpu", precision=mode)
    dtype = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}.get(mode, torch.float32)
    model = nn.ParameterList([torch.zeros(len(values) // 2 or 1), torch.zeros(len(values) - (len(values) // 2 or 1))])
    model, optimizer = fabric.setup(model, SGD(model.parameters(), lr=1.0, **options))
    true = torch.tensor(values, dtype=torch.float64).to(dtype)
    for param, gradient in zip(model, true.split([param.numel() for param in model]), strict=True):
        param.grad = gradient.clone()
    norm = fabric.clip_gradients(model, optimizer, max_norm=1.0, norm_type=norm_type)
    expected = torch.linalg.vector_norm((true.double() / true.double().max()), norm_type) * true.double().max()
    assert norm.item() == pytest.approx(expected.item(), rel=1e-3)  # float32 sums lose some of a million
    assert norm.dtype is not dtype or dtype in (torch.float32, torch.float64)
    clipped = torch.cat([param.grad.double() for param in model])
    unit = true.double() * min(1.0, 1 / (expected.item() + 1e-6))
    torch.testing.assert_close(clipped, unit, rtol=2e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-3, atol=0)


def test_infinite_gradients_have_an_infinite_norm() -> None:
    fabric = Fabric(accelerator="cpu", precision="16-true")
    model = nn.Linear(2, 1, bias=False)
    fabric.setup(model, SGD(model.parameters(), lr=1.0))
    for bad in (float("inf"), float("nan")):
        model.weight.grad = torch.tensor([[bad, 1.0]], dtype=torch.float16)
        norm = fabric.clip_gradients(model, max_norm=1.0)
        assert norm is not None and not torch.isfinite(norm)
        model.weight.grad = torch.tensor([[bad, 1.0]], dtype=torch.float16)
        with pytest.raises(RuntimeError, match="non-finite"):
            fabric.clip_gradients(model, max_norm=1.0, error_if_nonfinite=True)


@pytest.mark.parametrize("mode", ["32-true", "64-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("whole_model", [True, False])
def test_sparse_gradients_are_clipped(mode: str, whole_model: bool) -> None:
    fabric = Fabric(accelerator="cpu", precision=mode)
    model = nn.Sequential(nn.Embedding(4, 2, sparse=True), nn.Linear(2, 1, bias=False))
    optimizer = SGD(model.parameters(), lr=1.0)
    fabric.setup(model, optimizer)
    before = model[0].weight.detach().clone()

    def backward() -> None:
        optimizer.zero_grad()
        fabric.backward(model[0](torch.tensor([1, 1, 2])).sum() / 4)  # row 1 twice: 0.5, row 2 once: 0.25

    arguments = (model, None) if whole_model else (model, optimizer)
    backward()
    norm = fabric.clip_gradients(*arguments, max_norm=0.125)
    assert norm is not None and norm.item() == pytest.approx(0.625**0.5, rel=1e-3)
    optimizer.step()
    moved = (before - model[0].weight.detach()).double()
    wanted = torch.tensor([[0.0], [0.5], [0.25], [0.0]]).double().expand(4, 2) * 0.125 / 0.625**0.5
    torch.testing.assert_close(moved, wanted, rtol=0, atol=0.01)
    backward()
    fabric.clip_gradients(*arguments, clip_val=0.3)
    assert model[0].weight.grad is not None
    assert model[0].weight.grad.to_dense()[:, 0].tolist() == pytest.approx([0.0, 0.3, 0.25, 0.0], rel=1e-2)
