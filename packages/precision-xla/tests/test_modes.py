"""By value and by the compiled program: what each mode computes in, what it keeps, and what a step costs the device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch_xla.amp.syncfree as syncfree
from torch import Tensor, nn

from precision_core import Fabric
from precision_core.testing import Net, loss_of, make_batch
from precision_xla import vendor
from precision_xla.programs import matrix_products
from precision_xla.support import RUNS as MODES

OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01),
    "syncfree.SGD": lambda params: syncfree.SGD(params, lr=0.05, momentum=0.9),
    "syncfree.AdamW": lambda params: syncfree.AdamW(params, lr=0.01),
}


def set_up(mode: str, optimizer: str = "SGD") -> tuple[Fabric, Net, torch.optim.Optimizer]:
    fabric = Fabric(accelerator="cpu", strategy="xla", precision=mode)
    model = Net()
    made = OPTIMIZERS[optimizer](model.parameters())
    fabric.setup(model, made)
    return fabric, model, made


@pytest.mark.parametrize("mode", MODES)
def test_products_and_what_is_kept_have_the_dtypes_of_the_table(mode: str) -> None:
    policy = MODES[mode]
    fabric, model, optimizer = set_up(mode)
    batch, target = make_batch(0, device=fabric.device)
    output = model(batch)
    assert output.dtype is policy.output
    assert matrix_products(vendor.hlo([output])) == Counter({policy.compute: 5})  # two blocks of two, and the head
    fabric.backward(loss_of(output, target))
    gradients = [param.grad for param in model.parameters() if param.grad is not None]
    products = matrix_products(vendor.hlo(gradients))
    assert products == Counter({policy.compute: 15})  # each forward, and for its input and its weight
    optimizer.step()
    assert {param.dtype for param in model.parameters()} == {policy.params}
    assert {gradient.dtype for gradient in gradients} == {policy.params}
    buffers = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    assert buffers and {value.dtype for value in buffers} == {policy.params}
    assert model.decay.dtype is policy.buffers


CASES = [(mode, "SGD") for mode in MODES if mode != "16-mixed"]
CASES += [("bf16-mixed", "AdamW"), ("16-mixed", "syncfree.SGD"), ("16-mixed", "syncfree.AdamW")]


@pytest.mark.parametrize(("mode", "optimizer"), CASES)
def test_fifty_steps_compile_nothing_and_read_nothing(mode: str, optimizer: str) -> None:
    assert _fifty_steps(mode, optimizer) == vendor.Counts(compilations=0, executions=50, reads=0)


def test_torchs_own_optimizer_under_a_scaled_loss_reads_one_value_a_step_and_the_report_says_so() -> None:
    found = _fifty_steps("16-mixed", "SGD")
    assert (found.compilations, found.reads) == (0, 50)
    fabric, *_ = set_up("16-mixed")
    (note,) = fabric.precision_plugin.report.notes
    assert "SGD reads one value from the device in each step" in note and "torch_xla.amp.syncfree.SGD" in note
    assert not set_up("16-mixed", "syncfree.SGD")[0].precision_plugin.report.notes
    assert not set_up("bf16-mixed")[0].precision_plugin.report.notes


def _fifty_steps(mode: str, optimizer: str) -> vendor.Counts:
    fabric, model, made = set_up(mode, optimizer)
    batches = [make_batch(step, device=fabric.device) for step in range(4)]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(made, 100)

    def steps(count: int) -> None:
        for step in range(count):
            batch, target = batches[step % 4]
            made.zero_grad()
            fabric.backward(loss_of(model(batch), target))
            fabric.clip_gradients(model, made, max_norm=1.0)
            made.step()
            schedule.step()

    steps(8)
    before = vendor.counts()
    steps(50)
    found = vendor.counts() - before
    assert fabric.precision_plugin.steps > 40
    return found


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_clipping_reads_nothing_and_returns_the_norm(norm_type: float) -> None:
    fabric, model, optimizer = set_up("32-true")
    batch, target = make_batch(0, device=fabric.device)
    for _ in range(2):
        optimizer.zero_grad()
        fabric.backward(loss_of(model(batch), target))
        gradients = [param.grad.clone() for param in model.parameters() if param.grad is not None]
        fabric.strategy.sync()
        before = vendor.counts()
        norm = fabric.clip_gradients(model, optimizer, max_norm=0.1, norm_type=norm_type)
        assert (vendor.counts() - before).reads == 0
    flat = torch.cat([gradient.flatten() for gradient in gradients]).double().cpu()
    assert norm.item() == pytest.approx(torch.linalg.vector_norm(flat, norm_type).item(), rel=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", MODES)
def test_norms_of_many_gradients_are_those_of_float64(mode: str) -> None:
    """XLA adds up bfloat16 in bfloat16: of these gradients it would find 11 and not 22, and clip to twice the norm."""
    fabric = Fabric(accelerator="cpu", strategy="xla", precision=mode)
    model = nn.Linear(1000, 1000, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    torch.manual_seed(0)
    values = 0.02 + 0.01 * torch.randn(1000, 1000)
    for kind, ord in (({"norm_type": 1.0}, 1), ({}, 2)):  # the second would overflow float16 when it is added up
        optimizer.zero_grad()
        fabric.backward((model.weight * values.to(fabric.device, model.weight.dtype)).float().sum())
        fabric.precision_plugin.unscale_gradients(optimizer)
        true = torch.linalg.vector_norm(model.weight.grad.cpu().double().flatten(), ord).item()  # type: ignore[union-attr]
        norm = fabric.clip_gradients(model, optimizer, max_norm=1.0, **kind)
        assert norm.item() == pytest.approx(true, rel=1e-5)  # type: ignore[union-attr]
        after = model.weight.grad.cpu().double().flatten()  # type: ignore[union-attr]
        assert torch.linalg.vector_norm(after, ord).item() == pytest.approx(1.0, rel=0.01)


def test_a_closure_runs_first_then_clipping_and_the_step() -> None:
    fabric, model, optimizer = set_up("bf16-mixed")
    other_fabric, other, made = set_up("bf16-mixed")
    batch, target = make_batch(0, device=fabric.device)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model(batch), target)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=0.1)
        return loss

    for _ in range(3):
        returned = optimizer.step(closure)
        made.zero_grad()
        loss = loss_of(other(batch), target)
        other_fabric.backward(loss)
        other_fabric.clip_gradients(other, made, max_norm=0.1)
        made.step()
        assert torch.equal(returned, loss)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(model.parameters(), other.parameters(), strict=True))


class Made(nn.Module):
    """Returns what it was given, and what it made."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> dict[str, torch.dtype]:
        made = torch.zeros(2, device=x.device)
        return {"given": x.dtype, "made": made.dtype, "counted": (torch.arange(2, device=x.device) / 2).dtype}


@pytest.mark.parametrize("mode", MODES)
def test_inputs_and_created_tensors_have_the_dtype_of_true_modes(mode: str) -> None:
    fabric = Fabric(accelerator="cpu", strategy="xla", precision=mode)
    model = fabric.setup(Made())
    policy = MODES[mode]
    kept = torch.float32 if policy.mixed else policy.params
    assert model(torch.ones(2, device=fabric.device)) == {"given": kept, "made": kept, "counted": kept}


def test_float32_products_are_asked_for_in_float32_where_the_strategy_says_so() -> None:
    from precision_xla import XLAStrategy

    fabric = Fabric(accelerator="cpu", strategy=XLAStrategy(matmul_precision="highest"))
    x = torch.ones(2, 2, device=fabric.device)
    assert "operand_precision={highest,highest}" in vendor.hlo([x @ x])
    with pytest.raises(ValueError, match=r"matmul_precision='exact'.*: allowed are default, high, highest"):
        XLAStrategy(matmul_precision="exact")
