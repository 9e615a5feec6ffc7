"""created_as as a context: nesting, exceptions, threads, and torch.compile."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils._device import _device_constructors

from precision_core.precision.model.default_dtype import _complete_factories, created_as

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


def test_contexts_nest_and_restore() -> None:
    seen = []
    outer = created_as(BF16)
    with outer:
        seen.append(torch.zeros(1).dtype)
        with created_as(F64):
            seen.append((torch.arange(3) / 3).dtype)
            assert torch.equal(torch.arange(3) / 3, torch.arange(3, dtype=F64) / 3)
            with outer:  # entered again
                seen.append(torch.tensor(0.1).dtype)
            with created_as(F32):
                seen.append(torch.where(torch.tensor([True]), 0.1, 0.2).dtype)
            seen.append(torch.ones(1).dtype)
        seen.append((torch.arange(3) / 3).dtype)
        with created_as(F32):  # its digits survive the bfloat16 around it
            assert torch.equal(torch.arange(3) / 3, torch.arange(3, dtype=F32) / 3)
            assert torch.equal(torch.tensor([0.1]), torch.tensor([0.1], dtype=F32))
    assert seen == [BF16, F64, BF16, F32, F64, BF16]
    with pytest.raises(ZeroDivisionError), created_as(F64):
        torch.zeros(1).item() / 0
    assert torch.zeros(1).dtype is F32


def test_another_thread_is_not_affected_while_inside() -> None:
    inside, done, seen = threading.Event(), threading.Event(), []

    def work() -> None:
        inside.wait(60)
        seen.append((torch.zeros(1).dtype, (torch.arange(3) / 3).dtype, torch.get_default_dtype()))
        with created_as(BF16):
            seen.append(torch.zeros(1).dtype)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    with created_as(F64):
        inside.set()
        assert done.wait(60) and torch.zeros(1).dtype is F64
    thread.join()
    assert seen == [(F32, F32, F32), BF16]
    assert torch.get_default_dtype() is F32


class Creates(nn.Module):
    """Makes tensors in every way that the mode tells apart."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12).view(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        position = torch.arange(x.shape[0])
        angle = position[:, None] / 10000 ** (torch.arange(0, 4) / 4)
        x = x + angle.sin() * torch.full((4,), 0.1) + torch.tensor([0.1, 0.2, 0.3, 0.4]) + torch.zeros(4)
        x = torch.where(position[:, None] > 1, x, 0.1) + torch.where(position[:, None] > 1, 0.1, 0.2)
        return (x @ self.weight + torch.linspace(0, 1, 3)) * torch.ones(3)


FULL = pytest.mark.full


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own
@pytest.mark.usefixtures("true_modes_compile")
@pytest.mark.parametrize(
    ("backend", "dtype", "inside"),
    [
        ("eager", F64, True),
        pytest.param("aot_eager", F64, False, marks=FULL),
        pytest.param("aot_eager", BF16, True, marks=FULL),
        ("aot_eager", BF16, False),
        pytest.param("inductor", F64, False, marks=FULL),
    ],
    ids=str,
)
def test_compiled_in_one_graph_it_gives_eagers_values(backend: str, dtype: torch.dtype, inside: bool) -> None:
    torch._dynamo.reset()
    model, x = Creates().to(dtype), torch.linspace(0, 1, 20, dtype=dtype).view(5, 4)

    def run(x: Tensor) -> Tensor:
        with created_as(dtype):
            return model(x)

    expected = run(x)
    if inside:
        actual = torch.compile(run, fullgraph=True, backend=backend)(x)
    else:
        with created_as(dtype):
            actual = torch.compile(model, fullgraph=True, backend=backend)(x)
    assert actual.dtype is expected.dtype is dtype
    torch.testing.assert_close(actual, expected, rtol=1e-14 if dtype is F64 else 2**-7, atol=0)
    assert torch.equal(actual, expected) or backend == "inductor"
    gradient = torch.autograd.grad(actual.sum(), model.weight)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), model.weight)[0])


@pytest.mark.usefixtures("true_modes_compile")
def test_a_list_of_factories_that_torch_made_while_linspace_was_replaced_is_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As after transformers' from_pretrained, which replaces it while it runs: compiled, the result was float32."""

    def compiled() -> torch.dtype:
        torch._dynamo.reset()

        def run(x: Tensor) -> Tensor:
            with created_as(BF16):
                return x + torch.linspace(0, 1, 3)

        return torch.compile(run, fullgraph=True, backend="eager")(torch.zeros(3, dtype=BF16)).dtype

    assert compiled() is BF16
    lists = _device_constructors, torch._dynamo.variables.torch.get_overridable_functions
    try:
        for each in lists:
            each.cache_clear()
        with monkeypatch.context() as replaced:
            replaced.setattr(torch, "linspace", lambda *args, **kwargs: None)
            _device_constructors()
        assert compiled() is F32  # what torch does with such a list: else this test tells nothing
        _complete_factories()
        assert compiled() is BF16
    finally:
        for each in lists:
            each.cache_clear()
        torch._dynamo.reset()


@pytest.mark.skipif(torch.__version__ >= "2.12", reason="is about a torch.compile that is too old")
@pytest.mark.parametrize("fullgraph", [True, False])
def test_an_older_torch_compile_is_refused(fullgraph: bool) -> None:
    torch._dynamo.reset()

    def run(x: Tensor) -> Tensor:
        with created_as(BF16):
            return x + torch.linspace(0, 1, 3)

    with pytest.raises(RuntimeError, match=r"compile true modes with torch 2\.12 or newer"):
        torch.compile(run, fullgraph=fullgraph, backend="eager")(torch.zeros(3))
