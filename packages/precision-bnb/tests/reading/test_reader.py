"""Layers whose weight other code reads stay floats, and the model computes what it does dequantised."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from precision_bnb import BitsandbytesPrecision, QuantizedLinear, dequantize
from precision_bnb.reading import weight_readers


def project(x: Tensor, layer: nn.Linear) -> Tensor:
    return x @ layer.weight.t()


def through(x: Tensor, layers: Any) -> Tensor:
    """Calls itself, with another list each time."""
    return through(project(x, layers[0]), layers[1:]) if len(layers) else x


class Base(nn.Module):
    """`read` and, in lists, `first` and `second` are read in some way or other; `called` never is."""

    scale = 2

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.called, self.read = nn.Linear(64, 64), nn.Linear(64, 64)
            self.reads = nn.ModuleList(nn.ModuleDict({"inner": nn.Linear(64, 64)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.called(self.reading(x))

    def reading(self, x: Tensor) -> Tensor:
        return x


READ, LISTED = {"read"}, {"reads.0.inner", "reads.1.inner"}


class Functional(Base):
    def reading(self, x: Tensor) -> Tensor:
        return F.linear(x, self.read.weight, self.read.bias)


class OfADtype(Base):
    def reading(self, x: Tensor) -> Tensor:
        return self.read(x.to(self.read.weight.dtype))


class OfAShape(Base):
    def reading(self, x: Tensor) -> Tensor:
        return self.read(x) / self.read.weight.shape[0]


class InALoop(Base):
    def reading(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.reads):
            x = x @ block["inner"].weight * (number + 1)
        return x


class InAComprehension(Base):
    def reading(self, x: Tensor) -> Tensor:
        weights = [each for block in self.reads[:] for each in (block.inner.weight,)]
        return x @ torch.stack(weights).mean(0)


class ByAFunction(Base):
    def reading(self, x: Tensor) -> Tensor:
        return project(x, layer=self.read)


class ByRecursion(Base):
    def reading(self, x: Tensor) -> Tensor:
        return through(x, [block["inner"] for block in self.reads])


class ByACheckpoint(Base):
    def reading(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(partial(project), x, self.read, use_reentrant=False)
        return result


class ByAName(Base):
    def reading(self, x: Tensor) -> Tensor:
        return x @ getattr(getattr(self, "read"), "weight")  # noqa: B009


class ByAProperty(Base):
    @property
    def matrix(self) -> Tensor:
        return self.read.weight

    def reading(self, x: Tensor) -> Tensor:
        return x @ self.matrix


class InALambda(Base):
    def reading(self, x: Tensor) -> Tensor:
        act: Callable[[nn.Linear], Tensor] = lambda layer: x @ layer.weight  # noqa: E731
        return act(self.read)


class OfAParent(Functional):
    def reading(self, x: Tensor) -> Tensor:
        return super().reading(x) + 1


class ThroughALocal(Base):
    def reading(self, x: Tensor) -> Tensor:
        layer = self.read if self.training or x.shape[0] > 1 else None
        with torch.no_grad():
            matrix = (layer or self.read).weight * self.scale
        return x @ matrix


class InPlace(Base):
    rescaled = False

    def reading(self, x: Tensor) -> Tensor:
        if not self.rescaled:
            with torch.no_grad():
                self.read.weight.div_(2)
            self.rescaled = True
        return self.read(x)


class OfTheFirst(Base):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))

    def reading(self, x: Tensor) -> Tensor:
        return self.part(x.to(next(self.part.parameters()).dtype))


class OfAnother(Base):
    class Head(nn.Module):
        def forward(self, x: Tensor, layer: nn.Linear) -> Tensor:
            return x @ layer.weight

    def __init__(self) -> None:
        super().__init__()
        self.head = self.Head()

    def reading(self, x: Tensor) -> Tensor:
        return self.head(x, self.read)


class OfAnObject(Base):
    """One that is no module, and is handed the layers."""

    class Engine:
        def __init__(self, layers: list[nn.Linear]) -> None:
            self.layers = layers

        def run(self, x: Tensor) -> Tensor:
            return x @ self.layers[0].weight

    def __init__(self) -> None:
        super().__init__()
        self.engine = self.Engine([self.read])

    def reading(self, x: Tensor) -> Tensor:
        return self.engine.run(x)


class ByStars(Base):
    @staticmethod
    def product(x: Tensor, *layers: nn.Linear) -> Tensor:
        for layer in layers:
            x = x @ layer.weight
        return x

    def reading(self, x: Tensor) -> Tensor:
        return self.product(x, *(block["inner"] for block in self.reads))


class ByMatch(Base):
    def reading(self, x: Tensor) -> Tensor:
        match x.dim():
            case 2:
                return x @ self.read.weight
            case _:
                raise ValueError


KINDS: dict[type[Base], set[str]] = {
    Functional: READ,
    OfADtype: READ,
    OfAShape: READ,
    InALoop: LISTED,
    InAComprehension: LISTED,
    ByAFunction: READ,
    ByRecursion: LISTED,
    ByACheckpoint: READ,
    ByAName: READ,
    ByAProperty: READ,
    InALambda: READ,
    OfAParent: READ,
    ThroughALocal: READ,
    InPlace: READ,
    OfTheFirst: {"part.0"},
    OfAnother: READ,
    OfAnObject: READ,
    ByStars: LISTED,
    ByMatch: READ,
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_a_layer_whose_weight_is_read_stays_and_the_model_is_right(mode: str, kind: type[Base]) -> None:
    plugin, x = BitsandbytesPrecision(mode, torch.float32), torch.randn(3, 64)
    model = plugin.convert_module(kind()).eval()
    floats = {name for name, layer in model.named_modules() if type(layer) is nn.Linear}
    assert floats == KINDS[kind] and isinstance(model.called, QuantizedLinear)
    skipped = dict(plugin.report.skipped)
    assert all(skipped[name].startswith("its weight is read by ") for name in floats)
    exact = dequantize(copy.deepcopy(model)).double()
    expected = exact(x.double())
    if mode == "nf4":
        assert torch.allclose(model(x).double(), expected, rtol=1e-4, atol=1e-4)
    else:  # which rounds inputs, too
        assert (model(x).double() - expected).norm() < 0.03 * expected.norm()


class Harmless(Base):
    """Asks what a packed weight may be asked, reads in building, in dead branches, and in what no forward calls."""

    slow = False

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {})()
        self.config.parts = 1
        nn.init.ones_(self.read.weight)

    def reading(self, x: Tensor) -> Tensor:
        x = x.to(self.read.weight.device)
        if self.config.parts > 1 and self.slow:
            return F.linear(x, self.read.weight[:, :2])
        assert isinstance(self.read.weight, Tensor) and hasattr(self.read.weight, "data")
        if next(self.parameters()).device.type == "cpu" and not self.read.weight.requires_grad:
            x = x + 0
        return self.read(x)

    def _init_weights(self, module: Any) -> None:
        nn.init.zeros_(self.read.weight)

    def merge(self) -> None:
        self.read.weight.data += 1


class Adapter(nn.Module):
    """Somebody's own, which merges on request."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.merged = base, False
        self.lora_A, self.lora_B = nn.Linear(64, 4), nn.Linear(4, 64)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.base.weight)
        return self.base(x) + self.lora_B(self.lora_A(x))

    def merge(self) -> None:
        self.base.weight.data += self.lora_B.weight @ self.lora_A.weight
        self.merged = True


def test_what_is_not_read_in_a_forward_is_quantised() -> None:
    model = Harmless()
    model.called = Adapter(model.called)  # type: ignore[assignment]
    BitsandbytesPrecision("nf4", torch.float32).convert_module(model)(torch.randn(2, 64))
    kinds = {name: type(layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert {name for name, kind in kinds.items() if kind is nn.Linear} == {"called.lora_A", "called.lora_B"}


def test_weights_that_stay_floats_may_be_read() -> None:
    model = BitsandbytesPrecision("int8-training", torch.float32).convert_module(Functional())
    assert type(model.read).__name__ == "Int8TrainingLinear"
    model(torch.randn(2, 64))


def test_a_forward_of_its_own_and_hooks_are_followed() -> None:
    model = Base()
    model.forward = lambda x: x @ model.read.weight  # type: ignore[method-assign]
    assert {*weight_readers(model, [model.read, model.called])} == {model.read}
    model = Base()
    model.called.register_forward_pre_hook(lambda layer, args: (args[0] / layer.weight.shape[0],))
    assert {*weight_readers(model, [model.read, model.called])} == {model.called}


class Packing(Base):
    """Packs and unpacks over and over, as encoders do with their outputs: what a name may be must not grow with it."""

    def reading(self, x: Tensor) -> Tensor:
        pair, rest = (self.read, self.reads), [self.reads]
        for _ in range(3):
            pair, rest = (pair, rest), [rest, pair]
            pair, rest = (rest, pair), [pair, rest]
            pair, rest = (pair, rest), [rest, pair]
            pair, rest = (rest, pair), [pair, rest]
            pair, rest = (pair, rest), [rest, pair]
        return x


def test_values_do_not_grow_with_every_tuple() -> None:
    model = Packing()
    assert weight_readers(model, [model.read, model.called]) == {}


SOURCE = """
class Made(Base):
    def reading(self, x):
        return self.helper(x) + self.called(x.to(self.called.weight.device))

    def helper(self, x):
        return x @ self.read.weight.t()
"""


def test_without_source_bytecode_tells() -> None:
    names: dict[str, Any] = {"Base": Base, "__name__": __name__}
    exec(SOURCE, names)
    model = names["Made"]()
    assert weight_readers(model, [model.read, model.called]) == {model.read: "Made.helper"}
    converted = BitsandbytesPrecision("nf4", torch.float32).convert_module(model)
    assert type(converted.read) is nn.Linear and isinstance(converted.called, QuantizedLinear)
    converted(torch.randn(2, 64))


def test_where_all_are_read_it_is_an_error_that_says_by_what() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.only.weight

    with pytest.raises(ValueError, match=r"no layer to quantise.*only: its weight is read by .*One\.forward"):
        BitsandbytesPrecision("nf4").convert_module(One())


def test_what_bitsandbytes_has_packed_and_is_read_is_refused_by_name() -> None:
    from bitsandbytes.nn import Linear4bit

    model = Functional()
    model.read = Linear4bit(64, 64, quant_type="nf4", compress_statistics=False).to("cpu")
    with pytest.raises(ValueError, match=r"read: its weight is read by Functional\.reading, and bits") as caught:
        BitsandbytesPrecision("nf4").convert_module(model)
    assert "llm_int8_skip_modules=['read'], and name it in ignore_modules here" in str(caught.value)
