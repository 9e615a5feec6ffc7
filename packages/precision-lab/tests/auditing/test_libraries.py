"""Loops that Lightning Fabric, Accelerate, DDP and FSDP2 run: right ones, and the mistakes that can be made in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn

from precision_lab.auditing.context import audit
from precision_lab.auditing.report import Report

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]  # those of the libraries

Loop = Callable[[Any], None]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2))


def loss(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(torch.randn(4, 8)).float(), torch.tensor([0, 1, 0, 1]))


def codes(report: Report) -> list[tuple[str, str]]:
    return [(each.code, each.level) for each in report.findings if each.level != "info"]


# ---------------------------------------------------------------- Lightning Fabric


def lightning(loop: Loop, dtype: torch.dtype = torch.float32, fails: type[Exception] | None = None) -> Report:
    fabrics = pytest.importorskip("lightning_fabric")
    from lightning_fabric.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    fabric = fabrics.Fabric(accelerator="cpu", devices=1, plugins=MixedPrecision("16-mixed", "cpu", scaler=scaler))
    with audit() as report:
        model = net().to(dtype)
        model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
        t = SimpleNamespace(fabric=fabric, model=model, optimizer=optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            if fails is None:
                loop(t)
            else:
                with pytest.raises(fails):
                    loop(t)
                break
    assert report.record.libraries == ["Lightning"]
    return report


def test_lightning_right() -> None:
    def loop(t: Any) -> None:
        t.fabric.backward(loss(t.model))
        t.fabric.clip_gradients(t.model, t.optimizer, max_norm=1.0)
        t.optimizer.step()

    assert lightning(loop).findings == []


def test_lightning_clipped_by_torch() -> None:
    def loop(t: Any) -> None:
        t.fabric.backward(loss(t.model))
        nn.utils.clip_grad_norm_(t.model.parameters(), 1.0)
        t.optimizer.step()

    report = lightning(loop)
    assert codes(report) == [("clipped-while-scaled", "error")]
    assert "fabric.clip_gradients" in report.findings[0].remedy.for_(report.record.libraries)


def test_lightning_inner_optimizer_stepped() -> None:
    def loop(t: Any) -> None:
        t.fabric.backward(loss(t.model))
        t.optimizer.optimizer.step()

    assert codes(lightning(loop)) == [("stepped-while-scaled", "error")]


def test_lightning_inner_model_called() -> None:
    def loop(t: Any) -> None:
        t.fabric.backward(loss(t.model) + loss(t.model.module))
        t.optimizer.step()

    assert codes(lightning(loop)) == [("forward-outside-autocast", "warning")]


def test_lightning_backward_of_tensor() -> None:
    def loop(t: Any) -> None:
        loss(t.model).backward()

    report = lightning(loop, fails=RuntimeError)
    assert codes(report) == [("loss-unscaled", "error")]
    assert "fabric.backward(loss)" in report.findings[0].remedy.for_(report.record.libraries)


def test_lightning_half_parameters() -> None:
    def loop(t: Any) -> None:
        t.fabric.backward(loss(t.model))
        t.optimizer.step()

    report = lightning(loop, torch.float16, fails=ValueError)
    assert ("half-params-under-scaler", "error") in codes(report)


# ---------------------------------------------------------------- Accelerate


@pytest.mark.parametrize("mode", ["no", "bf16", "fp16"])
def test_accelerate(mode: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    try:
        accelerator = accelerate.Accelerator(mixed_precision=mode, cpu=True, gradient_accumulation_steps=2)
        with audit() as report:
            model = net()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
            model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
            for _ in range(4):
                with accelerator.accumulate(model):
                    accelerator.backward(loss(model))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
    finally:
        AcceleratorState._reset_state(True)
    # On a CPU it leaves float16 out.
    assert codes(report) == ([("mode-without-effect", "warning")] if mode == "fp16" else [])


# ---------------------------------------------------------------- torch.distributed


@pytest.fixture
def group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp2(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("wrap", [ddp, fsdp2], ids=lambda wrap: wrap.__name__)
@pytest.mark.parametrize("sharded_scaler", [False, True])
@pytest.mark.parametrize("right", [True, False])
def test_accumulation_under(wrap: Callable[[nn.Module], nn.Module], sharded_scaler: bool, right: bool) -> None:
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    model = wrap(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = (ShardedGradScaler if sharded_scaler else torch.amp.GradScaler)("cpu", init_scale=1024.0)
    with audit(model, optimizer) as report:
        for _ in range(2):
            optimizer.zero_grad()
            for _ in range(2):
                with torch.autocast("cpu", torch.float16):
                    value = loss(model) / 2
                scaler.scale(value).backward()
            if right:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
    assert codes(report) == ([] if right else [("clipped-while-scaled", "error")])
    assert not [text for text in report.unseen if "operations" in text]
