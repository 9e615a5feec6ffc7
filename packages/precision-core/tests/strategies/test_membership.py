"""An optimizer over another model, or over a copy, is said; one that has its own business is not."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from precision_core import DDPStrategy, Fabric
from precision_core.testing import run_in_ranks


def fabric(mode: str = "bf16-mixed") -> Fabric:
    return Fabric(accelerator="cpu", precision=mode)


def sgd(*modules: Any) -> SGD:
    params = [param for each in modules for param in (each.parameters() if isinstance(each, nn.Module) else [each])]
    return SGD(params, lr=0.1)


MESSAGE = "fabric.setup got a SGD that holds no parameter of this Linear, nor of another model"


@pytest.mark.parametrize("mode", ["32-true", "bf16-true", "16-mixed", "bf16-mixed"])
@pytest.mark.parametrize(
    "other",
    [
        lambda model: sgd(copy.deepcopy(model)),
        lambda model: sgd(nn.Linear(4, 1)),
        lambda model: sgd(nn.Parameter(torch.ones(2, 2))),
    ],
    ids=["a copy", "another model", "a parameter"],
)
def test_an_optimizer_over_another_model_is_refused(mode: str, other: Callable[[nn.Module], SGD]) -> None:
    host, model = fabric(mode), nn.Linear(2, 2)
    with pytest.raises(ValueError, match=MESSAGE):
        host.setup(model, other(model))
    assert "forward" not in vars(model) and model.weight.dtype is torch.float32
    host.setup(model, optimizer := sgd(model))  # the next setup is right
    host.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()


def test_a_model_that_two_optimizers_miss_is_refused() -> None:
    with pytest.raises(ValueError, match=MESSAGE):
        fabric().setup(nn.Linear(2, 2), sgd(nn.Linear(2, 2)), sgd(nn.Linear(1, 1)))


def allowed(case: str) -> None:
    host, model, other = fabric(), nn.Linear(2, 2), nn.Linear(2, 2)
    cases: dict[str, Callable[[], object]] = {
        "a part": lambda: host.setup(model, SGD([model.bias], lr=0.1)),
        "a loss module with the model": lambda: host.setup(model, sgd(model, other)),
        "a loss module's own": lambda: host.setup(model, sgd(model), sgd(other)),
        "a plain tensor": lambda: host.setup(model, sgd(torch.ones(2, requires_grad=True))),
        "a frozen model": lambda: host.setup(model.requires_grad_(False), sgd(nn.Parameter(torch.ones(2)))),
        "two models, one optimizer": lambda: (host.setup(model), host.setup(other, sgd(model, other))),
        "a model whose optimizer came first": lambda: (host.setup(model), host.setup(other, sgd(model))),
        "optimizers first": lambda: (host.setup_optimizers(sgd(model)), host.setup_module(model)),
        "apart": lambda: (host.setup_module(model), host.setup_optimizers(sgd(model), sgd(other))),
        "a tensor apart": lambda: (
            host.setup_module(model),
            host.setup_optimizers(sgd(torch.ones(2, requires_grad=True))),
        ),
        "a parameter apart": lambda: (
            host.setup_module(model.requires_grad_(False)),
            host.setup_optimizers(sgd(nn.Parameter(torch.ones(2)))),
        ),
        "compiled": lambda: host.setup(torch.compile(model, backend="eager"), sgd(model)),
    }
    cases[case]()


@pytest.mark.parametrize(
    "case",
    [
        "a part",
        "a loss module with the model",
        "a loss module's own",
        "a plain tensor",
        "a frozen model",
        "two models, one optimizer",
        "a model whose optimizer came first",
        "optimizers first",
        "apart",
        "a tensor apart",
        "a parameter apart",
        "compiled",
    ],
)
def test_what_has_its_reasons_is_set_up(case: str) -> None:
    allowed(case)  # warnings are errors


def test_an_optimizer_apart_that_misses_the_model_is_warned_of() -> None:
    host, model = fabric(), nn.Linear(2, 2)
    host.setup_module(model)
    says = "holds no parameter of a model that was set up, and no optimizer holds those"
    with pytest.warns(UserWarning, match=says) as warned:
        host.setup_optimizers(sgd(copy.deepcopy(model)))
    assert warned[0].filename == __file__


def beside(where: str) -> tuple[list[str], list[float]]:
    torch.manual_seed(0)
    host = Fabric(accelerator="cpu", devices=2, strategy=DDPStrategy(), precision="32-true")
    model, loss = nn.Linear(2, 2), nn.Linear(2, 1)
    optimizer = sgd(model, loss)
    host.setup(model, optimizer)
    if where == "set up":
        host.setup(loss)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.zero_grad()
            host.backward(loss(model(torch.full((1, 2), 1.0 + host.global_rank))).sum())
            optimizer.step()
    return [str(each.message) for each in caught], loss.weight.tolist()[0]


def test_under_ddp_parameters_of_no_model_are_said_once() -> None:
    (said, first), (_, second) = run_in_ranks(2, beside, "forgotten")
    assert len(said) == 1 and "steps 2 parameters of no model that was set up, of shapes (1, 2), (1,)" in said[0]
    assert first != second  # as it says
    (said, first), (_, second) = run_in_ranks(2, beside, "set up")
    assert not said and first == second


CALLS: dict[str, tuple[Callable[[Any, Any, Any, Path], Any], str]] = {
    "clip, the wrong way round": (lambda f, m, o, p: f.clip_gradients(o, m, max_norm=1.0), "Module, got a SGD"),
    "clip, parameters": (lambda f, m, o, p: f.clip_gradients(m.parameters(), max_norm=1.0), "Module, got a generator"),
    "clip, a list": (lambda f, m, o, p: f.clip_gradients(m, [o], max_norm=1.0), "optimizer, got a list.*for each"),
    "clip, a model twice": (lambda f, m, o, p: f.clip_gradients(m, m, clip_val=1.0), "optimizer, got a Linear"),
    "unscale, a model": (lambda f, m, o, p: f.unscale_gradients(m), "optimizer, got a Linear"),
    "unscale, nothing": (lambda f, m, o, p: f.unscale_gradients(None), "optimizer, got a NoneType"),
    "save_module, a state_dict": (lambda f, m, o, p: f.save_module(p, m.state_dict()), "Module, got a OrderedDict"),
    "load_module, a state_dict": (lambda f, m, o, p: f.load_module(p, m.state_dict()), "Module, got a OrderedDict"),
    "save_module, a state": (lambda f, m, o, p: f.save_module(p, {"model": m}), "Module, got a dict"),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("mode", ["32-true", "16-mixed"])
def test_what_is_no_model_or_no_optimizer_is_said_by_the_users_call(name: str, mode: str, tmp_path: Path) -> None:
    call, said = CALLS[name]
    host, model = fabric(mode), nn.Linear(2, 2)
    optimizer = sgd(model)
    host.setup(model, optimizer)
    method = {"clip": "clip_gradients", "unscale": "unscale_gradients"}.get(
        name.partition(",")[0], name.partition(",")[0]
    )
    with pytest.raises(ValueError, match=rf"fabric\.{method} expected a torch.*{said}"):
        call(host, model, optimizer, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
