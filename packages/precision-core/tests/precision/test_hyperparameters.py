"""Options that are 0 or infinite in the dtype in which a step computes are refused at setup."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adafactor, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop

from precision_core import Fabric


def stays_finite(optimizer: Optimizer, param: nn.Parameter) -> bool:
    for _ in range(3):
        param.grad = torch.zeros_like(param)
        param.grad.view(-1)[:8] = 1e-3
        optimizer.step()
    return bool(param.isfinite().all())


REFUSED = [
    (AdamW, {}, r"eps=1e-08 of param_groups\[0\] is 0 in float16"),
    (AdamW, {"foreach": True}, "eps=1e-08"),
    (Adam, {"eps": 1e-12}, "eps=1e-12"),
    (NAdam, {}, "eps=1e-08"),
    (RMSprop, {"lr": 1e-3}, "eps=1e-08"),
    (Adagrad, {}, "eps=1e-10"),
    (AdamW, {"eps": 1e5}, "eps=100000 of .* is inf in float16"),
    (AdamW, {"eps": 1e-4, "lr": 1e-6}, r"lr \* weight_decay=1e-08 of .* is 0 in float16.*no weight decays"),
    (SGD, {"lr": 1e6}, r"lr=1e\+06 of .* is inf in float16.*torch refuses the step"),
    (Adam, {"lr": torch.tensor(7e4), "eps": 1e-4}, r"lr=70000 of .* is inf in float16"),
    (Adagrad, {"lr": 1e5, "eps": 1e-4}, "lr=100000"),
    (AdamW, {"eps": 1e-4, "lr": torch.tensor(1e-6)}, r"lr \* weight_decay=1e-08"),
]
TAKEN: list[tuple[Any, dict[str, Any]]] = [
    (AdamW, {"eps": 1e-4}),
    (AdamW, {"eps": 1e-4, "lr": 1e-6, "weight_decay": 0.0}),
    (AdamW, {"eps": 1e-4, "lr": 0.0}),
    (AdamW, {"fused": True}),
    (Adam, {"eps": 6e-8, "lr": 1e-9, "weight_decay": 1e-2}),
    (SGD, {"lr": 1e-6, "weight_decay": 1e-2}),
    (Adam, {"lr": 60.0, "eps": 1e-4}),
    (Adafactor, {}),
]


@pytest.mark.parametrize(("kind", "options", "message"), REFUSED)
@pytest.mark.parametrize("together", [True, False])
def test_options_that_float16_does_not_hold(kind: Any, options: dict[str, Any], message: str, together: bool) -> None:
    fabric, model = Fabric(accelerator="cpu", precision="16-true"), nn.Linear(8, 8)
    if not together:
        fabric.setup(model)
    optimizer = kind(model.parameters(), **options)
    with pytest.raises(ValueError, match=rf"{kind.__name__}: {message}.*Pass.*16-mixed") as info:
        fabric.setup(model, optimizer) if together else fabric.setup_optimizers(optimizer)
    assert ("fused=True" in str(info.value)) is (kind in (Adam, AdamW, Adagrad))
    assert model.weight.dtype is (torch.float32 if together else torch.float16)  # nothing was set up
    assert not {"step", "add_param_group"} & vars(optimizer).keys()


@pytest.mark.parametrize(("kind", "options"), TAKEN)
def test_options_that_it_holds(kind: Any, options: dict[str, Any]) -> None:
    fabric, model = Fabric(accelerator="cpu", precision="16-true"), nn.Linear(64, 1, bias=False)
    optimizer = kind(model.parameters(), **options)
    fabric.setup(model, optimizer)
    assert stays_finite(optimizer, model.weight)


@pytest.mark.parametrize(("kind", "options"), [(Adam, {"eps": 1e-42}), (SGD, {"lr": 3.4e38})])
def test_bfloat16s_way_out_is_bfloat16_mixed(kind: Any, options: dict[str, Any]) -> None:
    model = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r'in bfloat16, which.*precision="bf16-mixed" \[optimizer-option\]$'):
        Fabric(accelerator="cpu", precision="bf16-true").setup(model, kind(model.parameters(), **options))


@pytest.mark.parametrize("mode", ["32-true", "64-true", "bf16-true", "16-mixed", "bf16-mixed"])
def test_other_modes_hold_torchs_defaults(mode: str) -> None:
    fabric, model = Fabric(accelerator="cpu", precision=mode), nn.Linear(8, 8)
    for kind in (AdamW, Adam, NAdam, Adagrad):
        fabric.setup_optimizers(kind(model.parameters())) if mode != "16-mixed" else None
    fabric.setup(model, AdamW(model.parameters()))


def test_each_group_has_its_options_and_its_dtype() -> None:
    fabric = Fabric(accelerator="cpu", precision="16-true; 1: 32-true")
    model = fabric.setup(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    wide = {"params": list(model[1].parameters()), "eps": 1e-8}
    optimizer = AdamW([{"params": list(model[0].parameters()), "eps": 1e-4}, wide])
    fabric.setup_optimizers(optimizer)
    with pytest.raises(ValueError, match=r"eps=1e-08 of param_groups\[1\]"):
        fabric.setup_optimizers(AdamW([{"params": [model[1].weight]}, {"params": [model[0].weight]}]))


def test_groups_that_are_added_later() -> None:
    fabric, model = Fabric(accelerator="cpu", precision="16-true"), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = AdamW(model[0].parameters(), eps=1e-4)
    fabric.setup(model, optimizer)
    with pytest.raises(ValueError, match=r"eps=1e-08 of param_groups\[1\] is 0 in float16"):
        optimizer.add_param_group({"params": model[1].parameters(), "eps": 1e-8})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": model[1].parameters()})
    fabric.teardown()
    assert "add_param_group" not in vars(optimizer)


def test_a_scheduler_may_begin_with_little() -> None:
    fabric, model = Fabric(accelerator="cpu", precision="16-true"), nn.Linear(8, 8)
    optimizer = AdamW(model.parameters(), eps=1e-4, lr=1e-3)
    torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1e-6)
    fabric.setup(model, optimizer)
