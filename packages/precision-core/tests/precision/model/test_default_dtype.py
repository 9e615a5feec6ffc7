"""Created tensors: which get the dtype and which do not, by value against torch's own float64 default dtype."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from precision_core.precision.model.default_dtype import created_as, outside_created_as

F64, F32, BF16, F16, C64, C128 = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    *(torch.complex64, torch.complex128),
)


@pytest.fixture(autouse=True)
def default_dtype_is_never_changed() -> Iterator[None]:
    yield
    assert torch.get_default_dtype() is F32


def ids() -> Tensor:
    return torch.tensor([1, 2, 3, 7])


def three() -> Tensor:
    return torch.tensor(3)


# What torch makes in its default dtype. Each is called again for every dtype.
CREATED: dict[str, Callable[[], Tensor]] = {
    "empty": lambda: torch.empty(2).fill_(0.1),
    "empty_strided": lambda: torch.empty_strided((2,), (1,)).fill_(0.1),
    "empty_permuted": lambda: torch.empty_permuted((2, 2), (0, 1)).fill_(0.1),
    "zeros": lambda: torch.zeros(2),
    "zeros of a tensor's size": lambda: torch.zeros(three(), 2),
    "ones": lambda: torch.ones((2, 3)),
    "rand": lambda: torch.rand(3, generator=torch.Generator().manual_seed(0)),
    "rand of a tensor's size": lambda: torch.rand(three(), generator=torch.Generator().manual_seed(0)),
    "randn": lambda: torch.randn(3, generator=torch.Generator().manual_seed(0)),
    "normal": lambda: torch.normal(0.1, 2.0, (3,), generator=torch.Generator().manual_seed(0)),
    "eye": lambda: torch.eye(3),
    "full": lambda: torch.full((2,), 0.1),
    "full of a tensor": lambda: torch.full((2,), torch.tensor(0.1)),
    "full of a tensor's size": lambda: torch.full((three(),), 0.1),
    "full of numpy's size": lambda: torch.full((numpy.int64(3),), 0.1),
    "linspace": lambda: torch.linspace(0, 1, 7),
    "linspace between tensors": lambda: torch.linspace(torch.tensor(0), three(), 7),
    "logspace": lambda: torch.logspace(0, 1, 7),
    "arange": lambda: torch.arange(0, 1, 0.1),
    "arange to a tensor": lambda: torch.arange(0, three(), 0.7),
    "tensor": lambda: torch.tensor([0.1]),
    "tensor of a number": lambda: torch.tensor(0.1),
    "tensor, nested": lambda: torch.tensor([[1, 0.1], [2, 3]]),
    "tensor, empty": lambda: torch.tensor([]),
    "as_tensor": lambda: torch.as_tensor([0.1, 1]),
    "asarray": lambda: torch.asarray([0.1, 1]),
    "scalar_tensor": lambda: torch.scalar_tensor(0.1),
    "sparse": lambda: torch.sparse_coo_tensor(ids()[None], [0.1, 0.2, 0.3, 0.4], check_invariants=True).to_dense(),
    "hann_window": lambda: torch.hann_window(7),
    "hamming_window": lambda: torch.hamming_window(7),
    "blackman_window": lambda: torch.blackman_window(7),
    "bartlett_window": lambda: torch.bartlett_window(7),
    "kaiser_window": lambda: torch.kaiser_window(7),
    "fftfreq": lambda: torch.fft.fftfreq(7),
    "rfftfreq": lambda: torch.fft.rfftfreq(7),
    "integers / integer": lambda: torch.arange(4) / 3,
    "integer / integers": lambda: 1 / ids(),
    "integers * float": lambda: ids() * 0.1,
    "integers + float": lambda: torch.add(ids(), 0.1),
    "float ** integers": lambda: 1.1 ** ids(),
    "float - bool": lambda: 0.1 - torch.tensor([True, False]).int(),
    "bool * float": lambda: torch.tensor([True]) * 0.1,
    "sqrt": lambda: ids().sqrt(),
    "sin": lambda: torch.sin(ids()),
    "exp": lambda: torch.exp(torch.arange(0, 4, 2) * (-numpy.log(10.0) / 4)),
    "sigmoid": lambda: ids().sigmoid(),
    "log": lambda: torch.log(ids()),
    "one_hot / 3": lambda: nn.functional.one_hot(ids()) / 3,
    "outer": lambda: torch.outer(1.0 / 3 ** (torch.arange(0, 4) / 4), torch.arange(2.0)),
    "where of floats": lambda: torch.where(ids() > 1, 0.1, 0.2),
    "where of a float and integers": lambda: torch.where(ids() > 1, 0.1, ids()),
    "Tensor.where": lambda: ids().where(ids() > 1, 0.1),
    "clamp": lambda: ids().clamp(1.1, 2.2),
    "mask": lambda: nn.Transformer.generate_square_subsequent_mask(3),
    "dtype=None": lambda: torch.zeros(2, dtype=None),
    "cat of integers and floats": lambda: torch.cat([ids(), torch.tensor([0.1])]),
}


@pytest.mark.parametrize("make", CREATED.values(), ids=CREATED)
@pytest.mark.parametrize("dtype", [F64, BF16, F16], ids=str)
def test_created_tensors_have_the_dtype_and_its_digits(make: Callable[[], Tensor], dtype: torch.dtype) -> None:
    torch.set_default_dtype(F64)
    try:
        expected = make()
    finally:
        torch.set_default_dtype(F32)
    assert make().dtype is F32
    with created_as(dtype):
        new = make()
    assert new.dtype is dtype
    if "rand" not in str(make.__code__.co_names) and "normal" not in str(make.__code__.co_names):
        tolerance = {F64: 1e-15, BF16: 2**-6, F16: 2**-9}[dtype]  # torch's windows are good to two last digits
        torch.testing.assert_close(new.double(), expected, rtol=tolerance, atol=tolerance)
    elif dtype is F64:
        assert torch.equal(new, expected)  # drawn in float64, and once


COMPLEX: dict[str, Callable[[], Tensor]] = {
    "tensor": lambda: torch.tensor([0.1j]),
    "full": lambda: torch.full((2,), 0.1 + 1j),
    "integers * imaginary": lambda: torch.exp(ids() * 1j / 3),
    "fft": lambda: torch.fft.fft(ids()),
    "rfft": lambda: torch.fft.rfft(ids()),
}


@pytest.mark.parametrize("make", COMPLEX.values(), ids=COMPLEX)
def test_complex_follows_float64(make: Callable[[], Tensor]) -> None:
    torch.set_default_dtype(F64)
    try:
        expected = make()
    finally:
        torch.set_default_dtype(F32)
    with created_as(F64):
        assert torch.equal(make(), expected) and expected.dtype is C128
    with created_as(BF16):
        assert make().dtype is C64  # there is no narrower partner


def saved(tensor: Tensor) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return file


X64, X32 = torch.tensor([0.1], dtype=F64), torch.tensor([0.1], dtype=F32)

# What says its dtype itself, and what that is.
SAID: dict[str, tuple[Callable[[], Any], torch.dtype]] = {
    "dtype=": (lambda: torch.zeros(2, dtype=F32), F32),
    "out=": (lambda: torch.zeros(1, out=torch.empty(1, dtype=F32)), F32),
    "tensor(dtype=)": (lambda: torch.tensor([0.1], dtype=F16), F16),
    "integers.float()": (lambda: ids().float(), F32),
    "integers.double()": (lambda: ids().double(), F64),
    "integers.half()": (lambda: ids().half(), F16),
    "integers.bfloat16()": (lambda: ids().bfloat16(), BF16),
    "integers.cfloat()": (lambda: ids().cfloat(), C64),
    "integers.cdouble()": (lambda: ids().cdouble(), C128),
    "integers.to(dtype)": (lambda: ids().to(F32), F32),
    "integers.to(tensor)": (lambda: ids().to(X32), F32),
    "integers.type(dtype)": (lambda: ids().type(F32), F32),
    "integers.type(name)": (lambda: ids().type("torch.FloatTensor"), F32),
    "integers.type_as(tensor)": (lambda: ids().type_as(X32), F32),
    "integers.view(dtype)": (lambda: ids().view(F64), F64),
    "sum(dtype=)": (lambda: ids().sum(dtype=F32), F32),
    "softmax(x, 0, dtype)": (lambda: torch.softmax(ids(), 0, F32), F32),
    "a float64 tensor's arithmetic": (lambda: X64 * ids() + 1, F64),
    "a float32 tensor's arithmetic": (lambda: (X32 / 3).sin().sum() * 2, F32),
    "zeros_like": (lambda: torch.zeros_like(X32), F32),
    "new_tensor": (lambda: X32.new_tensor([0.1]), F32),
    "tensor of a tensor": (lambda: torch.as_tensor(X32), F32),
    "tensor of tensors": (lambda: torch.tensor([torch.tensor(0.1, dtype=F32)]), F32),
    "numpy": (lambda: torch.tensor(numpy.ones(2)), F64),
    "numpy's scalar": (lambda: torch.tensor(numpy.float32(0.1)), F32),
    "from_numpy": (lambda: torch.from_numpy(numpy.ones(2, numpy.float32)), F32),
    "frombuffer": (lambda: torch.frombuffer(bytearray(8), dtype=F32), F32),
    "load": (lambda: torch.load(saved(torch.tensor([0.1], dtype=F16))), F16),
    "normal of tensors": (lambda: torch.normal(X32, 1.0), F32),
    "where of tensors": (lambda: torch.where(ids() > 1, X32, 0.1), F32),
    "stack of tensors": (lambda: torch.stack([X32, X32]), F32),
    "keyword tensors": (lambda: torch.add(input=ids(), other=X32), F32),
    "integers": (lambda: torch.arange(4) * torch.full((4,), 2) // 3, torch.int64),
    "bool": (lambda: torch.ones(2) > 0, torch.bool),
    "torch.ops": (lambda: torch.ops.aten.div.Tensor(ids(), ids()), F32),
}


@pytest.mark.parametrize(("make", "expected"), SAID.values(), ids=SAID)
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_a_dtype_that_was_said_stays(make: Callable[[], Any], expected: torch.dtype, dtype: torch.dtype) -> None:
    with created_as(dtype):
        assert make().dtype is expected


def test_random_factories_draw_as_often_as_without() -> None:
    def draw() -> Tensor:
        torch.manual_seed(0)
        torch.rand(3), torch.randn(2), torch.normal(0.0, 1.0, (2,))
        return torch.randint(100, (5,))

    expected = draw()
    with created_as(F32):
        assert torch.equal(draw(), expected)


def test_a_function_may_run_outside() -> None:
    seen = []

    class Seeing(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    class Own(Tensor):
        pass

    @outside_created_as
    def hook(tensor: Tensor, fails: bool = False) -> tuple[torch.dtype, type]:
        if fails:
            raise ValueError("from the hook")
        return torch.zeros(1).dtype, type(tensor.detach())

    own = torch.ones(2).as_subclass(Own)
    assert hook(own) == (F32, Own)
    with created_as(F64):
        assert hook(own) == (F32, Own)
        assert torch.zeros(1).dtype is F64
        with pytest.raises(ValueError, match="from the hook"):
            hook(own, True)
        assert torch.zeros(1).dtype is F64
        with created_as(BF16):
            assert hook(own) == (F64, Own)  # outside of the innermost
    with Seeing(), created_as(F64):
        assert hook(own) == (F32, Own) and torch.zeros in seen
    with created_as(F64), Seeing():  # what forward itself entered sees what the hook does, so it all stays
        assert hook(own) == (F64, Own)


HUGE = 1e300  # beyond float32, and so beyond every narrower default dtype


def compressed(kind: str, indices: list[list[int]], **options: Any) -> Tensor:
    make = getattr(torch, f"sparse_{kind}_tensor")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # once in a process: in beta state
        return make(*indices, [HUGE], (1, 1), check_invariants=True, **options).to_dense()  # type: ignore[no-any-return]


BEYOND: dict[str, Callable[[], Tensor]] = {
    "full": lambda: torch.full((2,), torch.finfo(F64).min),
    "full by name": lambda: torch.full(size=(2,), fill_value=HUGE),
    "full of a tensor": lambda: torch.full((2,), torch.tensor(-HUGE)),
    "full of numpy's float64": lambda: torch.full((2,), numpy.float64(HUGE)),
    "full of a complex": lambda: torch.full((2,), complex(HUGE, 1)),
    "scalar_tensor": lambda: torch.scalar_tensor(HUGE),
    "tensor": lambda: torch.tensor([HUGE, -HUGE]),
    "arange": lambda: torch.arange(0, HUGE, HUGE / 4),
    "arange to a tensor": lambda: torch.arange(0, torch.tensor(HUGE), HUGE / 4),
    "compressed rows": lambda: compressed("csr", [[0, 1], [0]]),
    "compressed columns": lambda: compressed("csc", [[0, 1], [0]]),
    "compressed": lambda: compressed("compressed", [[0, 1], [0]], layout=torch.sparse_csr),
    "where": lambda: torch.where(ids() > 0, HUGE, 0.0),
    "where of an int": lambda: torch.where(ids() > 0, HUGE, 0),
    "where of integers": lambda: torch.where(ids() > 0, ids(), HUGE),
    "Tensor.where": lambda: ids().where(ids() > 0, -HUGE),
    "clamp": lambda: ids().clamp(max=HUGE),
    "clamp_min": lambda: torch.clamp_min(ids(), HUGE),
    "times": lambda: ids() * HUGE,
    "power": lambda: HUGE ** ids(),
    "difference": lambda: HUGE - ids(),
}


def test_a_value_beyond_the_dtype_stays_in_the_wider_one() -> None:
    with created_as(BF16):
        made = torch.full((2,), torch.tensor(torch.finfo(F32).min, dtype=F32))
    assert made.dtype is F32 and made[0] == torch.finfo(F32).min


@pytest.mark.parametrize("default", [F32, torch.float16], ids=str)
@pytest.mark.parametrize("make", BEYOND.values(), ids=BEYOND)
def test_values_beyond_the_default_dtype_are_not_made_in_it_first(
    make: Callable[[], Tensor], default: torch.dtype
) -> None:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(F64)
        expected = make()
        torch.set_default_dtype(default)
        with created_as(F64):
            actual = make()
    finally:
        torch.set_default_dtype(before)
    assert actual.dtype is expected.dtype and torch.equal(actual, expected)
