"""TF32 is off where float32 was asked for, or on where that was, and the process's settings come back as they were."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.backends import cudnn

from precision_core import Fabric
from precision_core.hardware import FORMATS
from precision_core.precision import tf32
from precision_core.precision.tf32 import CONTEXTS, Tf32

matmul, conv, rnn, onednn = (
    torch.backends.cuda.matmul,
    cudnn.conv,  # type: ignore[attr-defined]
    cudnn.rnn,  # type: ignore[attr-defined]
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
)
everything: Any = torch.backends
X = torch.ones(4, 3)


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.9's of the old form
        yield
        everything.fp32_precision = everything.cudnn.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = onednn.fp32_precision = "none"
        cudnn.allow_tf32 = True


@pytest.fixture
def like_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a CPU's runs set what those of a CUDA device set: flags that exist on every machine."""
    monkeypatch.setitem(CONTEXTS, "cpu", CONTEXTS["cuda"])


def now() -> tuple[str, str, str]:
    return matmul.fp32_precision, conv.fp32_precision, rnn.fp32_precision


def every_setting() -> tuple[Any, ...]:
    """What can be asked of torch about TF32, "raises" where the two forms disagree."""

    def ask(question: Callable[[], Any]) -> Any:
        try:
            return question()
        except RuntimeError:
            return "raises"

    return (
        *now(),
        onednn.fp32_precision,
        everything.fp32_precision,
        everything.cudnn.fp32_precision,
        *map(ask, (torch.get_float32_matmul_precision, lambda: matmul.allow_tf32, lambda: cudnn.allow_tf32)),
    )


def setting(**values: Any) -> Callable[[], None]:
    def set_them() -> None:
        for name, value in values.items():
            if name == "old":
                torch.set_float32_matmul_precision(value)
            else:
                owner, attribute = {
                    "matmul": (matmul, "fp32_precision"),
                    "old_matmul": (matmul, "allow_tf32"),
                    "conv": (conv, "fp32_precision"),
                    "rnn": (rnn, "fp32_precision"),
                    "old_cudnn": (cudnn, "allow_tf32"),
                    "all": (everything, "fp32_precision"),
                    "all_cuda": (everything.cudnn, "fp32_precision"),
                    "onednn": (onednn, "fp32_precision"),
                }[name]
                setattr(owner, attribute, value)

    return set_them


SETTINGS = {
    "torch's": setting(),
    "high": setting(old="high"),
    "medium": setting(old="medium"),
    "medium, and oneDNN apart": setting(old="medium", onednn="ieee"),
    "old forms": setting(old_matmul=True, old_cudnn=False),
    "old forms off": setting(old_matmul=False, old_cudnn=False),
    "both forms off": setting(old_cudnn=False, conv="ieee", rnn="ieee"),
    "new forms": setting(matmul="tf32", conv="ieee"),
    "new forms off": setting(matmul="ieee", conv="ieee"),
    "all": setting(all="tf32"),
    "all of CUDA": setting(all_cuda="tf32"),
    "all ieee": setting(all="ieee"),
    "both forms": setting(old="high", matmul="ieee", conv="ieee"),
}


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_as_asked_inside_and_as_before_after_it(name: str, allowed: bool) -> None:
    SETTINGS[name]()
    before, wanted = every_setting(), ("tf32",) * 3 if allowed else ("no",) * 3
    context = Tf32(allowed)
    for _ in range(2):
        with pytest.raises(KeyError), context:
            inside = every_setting()
            with context, Tf32(not allowed):
                assert ("tf32" in now()) is not allowed
            assert every_setting() == inside
            raise KeyError
        assert tuple(each if each == "tf32" else "no" for each in inside[:3]) == wanted
        assert every_setting() == before
    if "raises" not in before and not allowed:  # torch's compiler asks the old forms, and so do users
        assert "raises" not in inside[7:]


def test_a_setting_for_all_is_followed_afterwards() -> None:
    everything.fp32_precision = "tf32"
    with Tf32(False):
        assert "tf32" not in now()
    everything.fp32_precision = "ieee"
    assert matmul.fp32_precision == "ieee"


class Watching(nn.Module):
    """Notes the settings in forward and in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.conv = nn.Conv1d(3, 3, 1)
        self.seen: list[tuple[str, str, str]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(now())
        y = self.linear(x)
        y.register_hook(lambda gradient: self.seen.append(now()))
        return y


OFF, ON = ("none", "none", "none"), ("tf32",) * 3
TORCHS = ("none", "tf32", "tf32")


@pytest.mark.usefixtures("like_cuda")
@pytest.mark.parametrize("mode", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
@pytest.mark.parametrize(("allowed", "inside"), [(False, OFF), (True, ON)])
def test_forward_backward_and_autocast(mode: str, allowed: bool, inside: tuple[str, str, str]) -> None:
    fabric, model = Fabric("cpu", precision=mode, tf32=allowed), Watching()
    assert fabric._again.keywords["tf32"] is allowed  # type: ignore[attr-defined]  # what launched processes get
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    for _ in range(2):
        fabric.backward(model(X).sum())
        assert now() == TORCHS
        optimizer.step()
    assert model.seen == [inside] * 4
    with fabric.autocast():
        assert now() == inside
        assert (X @ X.t()).dtype is fabric.precision_plugin.policy.compute or mode == "bf16-true"
    assert now() == TORCHS
    fabric.teardown()
    model.seen.clear()
    model(X if mode != "bf16-true" else X.bfloat16())
    assert model.seen == [TORCHS]


@pytest.mark.usefixtures("like_cuda")
def test_an_error_in_forward_or_backward_gives_the_settings_back() -> None:
    def fail(*_: Any) -> None:
        raise KeyError

    fabric, model = Fabric("cpu"), nn.Linear(3, 1)
    fabric.setup(model)
    loss = model(X).sum()
    loss.register_hook(fail)
    with pytest.raises(KeyError):
        fabric.backward(loss)
    assert now() == TORCHS
    with pytest.raises(RuntimeError):
        model(torch.ones(4, 7))
    assert now() == TORCHS
    with pytest.raises(KeyError), fabric.autocast():
        fail()
    assert now() == TORCHS


def test_other_devices_set_nothing() -> None:
    fabric, model = Fabric("cpu"), Watching()
    fabric.setup(model)
    fabric.backward(model(X).sum())
    assert model.seen == [TORCHS] * 2
    with fabric.autocast():
        assert now() == TORCHS


@pytest.mark.usefixtures("like_cuda", "fresh_compiler")
@pytest.mark.parametrize("first", ["compile", "setup"])
def test_a_compiled_model_is_one_graph_that_runs_in_the_setting(first: str) -> None:
    seen: list[tuple[str, tuple[str, str, str]]] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(("compiled", now()))

        def run(*args: Any) -> Any:
            seen.append(("run", now()))
            return graph(*args)

        return run

    def compiled(model: nn.Module) -> Any:
        return torch.compile(model, backend=backend, fullgraph=True)

    fabric, model = Fabric("cpu"), nn.Sequential(nn.Conv1d(4, 2, 1), nn.Linear(3, 2))
    expected = model(X[None]).detach()
    if first == "compile":
        model = fabric.setup(compiled(model))
        assert torch.allclose(model(X[None]), expected) and torch.allclose(model(X[None]), expected)
        assert seen == [("compiled", OFF), ("run", OFF), ("run", OFF)]
    else:
        model = compiled(fabric.setup(model))
        with pytest.warns(UserWarning, match="compiled after fabric.setup, or in place, and TF32"):
            assert torch.allclose(model(X[None]), expected)
        assert seen == [("compiled", TORCHS), ("run", TORCHS)]
    fabric.backward(model(X[None]).sum())
    assert now() == TORCHS


@pytest.mark.usefixtures("like_cuda", "fresh_compiler")
def test_autocast_in_what_is_compiled_leaves_the_graph_whole() -> None:
    fabric, layer = Fabric("cpu", precision="bf16-mixed"), nn.Linear(3, 2)

    @torch.compile(backend="eager", fullgraph=True)
    def run(x: Tensor) -> Tensor:
        with fabric.autocast():
            return layer(x)

    assert run(X).dtype is torch.bfloat16


def test_an_inner_context_that_fails_gives_the_settings_back() -> None:
    class Fails(contextlib.AbstractContextManager[None]):
        def __enter__(self) -> None:
            raise KeyError

        def __exit__(self, *error: Any) -> None:
            raise AssertionError

    with pytest.raises(KeyError), Tf32(False, Fails()):
        pass
    assert now() == TORCHS


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_what_is_compiled_after_setup_is_warned_of_where_it_matters(
    like_cuda: None, fresh_compiler: None, recwarn: pytest.WarningsRecorder
) -> None:
    model = torch.compile(Fabric("cpu").setup(nn.Linear(3, 1)), backend="eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(X)  # torch allows TF32 in no product of matrices, and there is no convolution
    torch._dynamo.reset()
    torch.set_float32_matmul_precision("high")
    model = torch.compile(Fabric("cpu").setup(nn.Linear(3, 1)), backend="eager", fullgraph=True)
    with pytest.warns(UserWarning, match="TF32 is allowed"):
        model(X)


def test_no_warning_of_the_old_form_reaches_anybody() -> None:
    tf32._no_warning.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for allowed in (False, True):
            with Tf32(allowed):
                pass


def test_another_value_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Fabric\(tf32='high'\): expected True or False"):
        Fabric("cpu", tf32="high")  # type: ignore[arg-type]


def test_the_support_table_says_how_to_allow_it() -> None:
    """`supports` and `precision doctor` print this of a CUDA device."""
    level, reason = FORMATS["cuda"][torch.float32]()
    assert level == "native" and reason.endswith("TF32 by Fabric(tf32=True)")
