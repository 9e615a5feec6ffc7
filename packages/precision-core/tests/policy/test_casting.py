"""Casting: every container a user may build, with its values, its identity and its gradients kept."""

from __future__ import annotations

import collections
import dataclasses
import types
from typing import Any, ClassVar, NamedTuple

import numpy
import pytest
import torch
from torch import Tensor, nn

from precision_core.policy.casting import cast, cast_dtype, map_tensors, move

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
VALUES = [0.1, -3.0, 1000.5]


class Pair(NamedTuple):
    x: Any
    y: Any


class OneArgument(collections.namedtuple("OneArgument", "x doubled")):
    __slots__ = ()

    def __new__(cls, x: Tensor) -> OneArgument:
        return super().__new__(cls, x, x * 2)


class Tags(list):  # type: ignore[type-arg]
    source = "file"


@dataclasses.dataclass
class Plain:
    x: Any
    y: Any = None
    made: list[str] = dataclasses.field(default_factory=list, init=False)
    count: ClassVar[int] = 0

    def __post_init__(self) -> None:
        Plain.count += 1


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Any
    y: Any = None
    norm: Any = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", self.x * 2)


@dataclasses.dataclass(frozen=True, slots=True)
class Slots:
    x: Any
    y: Any = None


@dataclasses.dataclass
class Unset:
    x: Any
    y: Any = dataclasses.field(init=False)  # never set


class ModelOutput(collections.OrderedDict):  # type: ignore[type-arg]
    """As in transformers: a dataclass and an OrderedDict at once, each item is an attribute too, None is no item."""

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if getattr(self, field.name) is not None:
                super().__setitem__(field.name, getattr(self, field.name))

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.keys() and value is not None:
            super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __reduce__(self) -> Any:
        call, _, *rest = super().__reduce__()
        return call, tuple(getattr(self, field.name) for field in dataclasses.fields(self)), *rest  # type: ignore[arg-type]


class Output(ModelOutput):
    x: Any = None
    y: Any = None
    loss: Any = None


def read(tree: Any) -> tuple[Any, Any]:
    """Returns x and y of any of the containers below."""
    if isinstance(tree, collections.abc.Mapping):
        return tree["x"], tree["y"]
    return (tree.x, tree.y) if hasattr(tree, "x") else (tree[0], tree[1])


CONTAINERS = {
    "dict": lambda x, y: {"x": x, "y": y},
    "list": lambda x, y: [x, y],
    "tuple": lambda x, y: (x, y),
    "namedtuple": Pair,
    "list subclass": lambda x, y: Tags([x, y]),
    "OrderedDict": lambda x, y: collections.OrderedDict(x=x, y=y),
    "defaultdict": lambda x, y: collections.defaultdict(list, x=x, y=y),
    "UserDict": lambda x, y: collections.UserDict(x=x, y=y),
    "read-only mapping": lambda x, y: types.MappingProxyType({"x": x, "y": y}),
    "dataclass": Plain,
    "frozen dataclass": Frozen,
    "slots dataclass": Slots,
    "ModelOutput": lambda x, y: Output(x=x, y=y),
    "nested": lambda x, y: Pair({"a": [x]}, (y, {})),
}


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)
def test_containers_come_back_as_they_were_with_floats_cast(make: Any) -> None:
    x, y = torch.tensor(VALUES), torch.tensor([1, 2])
    old = make(x, y)
    new = cast(old, BF16)
    assert type(new) is type(old)
    if isinstance(new, Pair) and isinstance(new.x, dict):
        assert (new.x["a"][0].dtype, new.y[0] is y, new.y[1] is old.y[1]) == (BF16, True, True)
        return
    new_x, new_y = read(new)
    assert new_x.dtype is BF16 and torch.equal(new_x, x.to(BF16)) and new_y is y
    assert read(old)[0] is x and x.dtype is F32  # what was given is as it was


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)
def test_nothing_is_copied_when_nothing_changes(make: Any) -> None:
    tree = make(torch.tensor(VALUES, dtype=BF16), "text")
    assert cast(tree, BF16) is tree
    assert map_tensors(tree, lambda tensor: tensor) is tree


def test_what_containers_hold_besides_their_items_is_kept() -> None:
    x = torch.tensor(VALUES)
    assert cast(collections.defaultdict(list, x=x), BF16)["new"] == []
    tags = Tags([x])
    tags.source = "net"
    assert cast(tags, BF16).source == "net"
    plain, frozen, count = Plain(x), cast(Frozen(x), BF16), Plain.count
    assert cast(plain, BF16).made is plain.made and Plain.count == count  # __post_init__ did not run again
    assert torch.equal(frozen.norm, (x * 2).to(BF16))
    unset = cast(Unset(x), BF16)
    assert unset.x.dtype is BF16 and not hasattr(unset, "y")
    output = cast(Output(x=x, loss=x.sum()), BF16)
    assert output.x is output["x"] and output.loss.dtype is BF16 and output.y is None and list(output) == ["x", "loss"]
    assert torch.equal(cast(OneArgument(x), F64).doubled, (x * 2).double())


def test_torchs_own_tuples() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.rand(2, 3), torch.rand(4, 3)], enforce_sorted=False)
    new = cast(packed, F64)
    assert type(new) is type(packed) and torch.equal(new.data, packed.data.double())
    assert new.batch_sizes is packed.batch_sizes and new.sorted_indices is packed.sorted_indices
    result = cast(torch.rand(3, 3).max(0), F64)
    assert type(result) is torch.return_types.max and (result.values.dtype, result.indices.dtype) == (F64, torch.int64)
    size = torch.Size([2, 3])
    assert cast(size, F64) is size


# dtype -> what it becomes under float64, float32, bfloat16, float16
DTYPES = {
    **dict.fromkeys((F64, F32, BF16, F16), (F64, F32, BF16, F16)),
    torch.complex64: (torch.complex128, torch.complex64, torch.complex64, torch.complex64),
    torch.complex128: (torch.complex128, torch.complex64, torch.complex128, torch.complex128),
    **{
        dtype: (dtype,) * 4
        for dtype in (torch.bool, torch.uint8, torch.int32, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2)
    },
}


@pytest.mark.parametrize("current", DTYPES, ids=str)
def test_dtypes(current: torch.dtype) -> None:
    tensor = torch.tensor([1, 0, 1]).to(current)
    for wanted, expected in zip((F64, F32, BF16, F16), DTYPES[current], strict=True):
        assert cast_dtype(current, wanted) is expected
        new = cast(tensor, wanted)
        assert new.dtype is expected and (new is tensor) == (expected is current)
        assert torch.equal(new.to(torch.complex128), tensor.to(torch.complex128))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # deprecated, and still met
def test_quantised_tensors_stay_as_they_are() -> None:
    tensor = torch.quantize_per_tensor(torch.tensor(VALUES), 0.1, 0, torch.qint8)
    assert cast([tensor], BF16)[0] is tensor


def test_the_same_tensor_is_cast_once_wherever_it_is() -> None:
    x, calls = torch.tensor(VALUES), []
    tree = {"a": x, "b": [x, Pair(x, Plain(x))], "c": torch.tensor(VALUES)}

    def count(tensor: Tensor) -> Tensor:
        calls.append(tensor)
        return tensor.double()

    new = map_tensors(tree, count)
    assert len(calls) == 2
    assert new["a"] is new["b"][0] is new["b"][1].x is new["b"][1].y.x is not new["c"]


def test_gradients_flow_through() -> None:
    x = torch.tensor(VALUES, requires_grad=True)
    y = cast({"a": (x,), "b": x}, F64)
    (y["a"][0] * y["b"]).sum().backward()
    assert x.grad is not None and x.grad.dtype is F32 and torch.equal(x.grad, 2 * x.detach())


LEAVES = [None, "text", "", b"bytes", 3, 0.5, range(3), {1, 2}, numpy.ones(2), object(), nn.Linear(2, 2), Plain, F32]


@pytest.mark.parametrize("leaf", [*LEAVES, {}, [], (), Output(), Plain(None)], ids=lambda leaf: type(leaf).__name__)
def test_leaves_and_empty_containers_pass_as_they_are(leaf: Any) -> None:
    assert cast(leaf, BF16) is leaf
    assert cast([leaf, torch.ones(1)], BF16)[0] is leaf


def test_deep_and_endless_trees() -> None:
    tree: Any = torch.tensor(VALUES)
    for _ in range(200):
        tree = [tree]
    new = cast(tree, BF16)
    while isinstance(new, list):
        (new,) = new
    assert new.dtype is BF16
    endless: list[Any] = [torch.ones(1)]
    endless.append(endless)
    with pytest.raises(RecursionError):
        cast(endless, BF16)


@pytest.mark.usefixtures("true_modes_compile")
def test_compiles_as_one_graph() -> None:
    def function(x: Tensor, y: Tensor) -> Any:
        args, kwargs = cast(((x, [y], Pair(x, None)), {"x": x, "y": y, "name": "a"}), BF16)
        return args[0] * kwargs["x"], args[1][0] + 1, args[2].x

    x, y = torch.tensor(VALUES), torch.tensor([1, 2])
    expected = function(x, y)
    for mine, theirs in zip(torch.compile(function, fullgraph=True, backend="eager")(x, y), expected, strict=True):
        assert mine.dtype is theirs.dtype and torch.equal(mine, theirs)


class Tagged(dict):  # type: ignore[type-arg]
    """A dict subclass with a keyword of its own and an attribute."""

    def __init__(self, *, tag: str, **items: Any) -> None:
        super().__init__(**items)
        self.tag = tag


@pytest.mark.usefixtures("true_modes_compile")
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.full)])
def test_containers_made_in_a_compiled_forward_keep_all_their_entries(backend: str) -> None:
    def function(x: Tensor, y: Tensor) -> Any:
        tagged = Tagged(tag="t", y=y, x=x.to(BF16))
        return cast(collections.OrderedDict(loss=x.sum(), x=x.to(BF16), y=y, z=[tagged, None]), F32)

    torch.compiler.reset()
    x, y = torch.tensor(VALUES), torch.tensor([1, 2])
    output = torch.compile(function, backend=backend, fullgraph=True)(x, y)
    tagged = output["z"][0]
    assert (type(output), list(output)) == (collections.OrderedDict, ["loss", "x", "y", "z"])
    assert (type(tagged), list(tagged), tagged.tag, output["z"][1]) == (Tagged, ["y", "x"], "t", None)
    for new in (output["x"], tagged["x"]):
        assert new.dtype is F32 and torch.equal(new, x.to(BF16).float())
    assert torch.equal(output["loss"], x.sum()) and torch.equal(output["y"], y) and torch.equal(tagged["y"], y)


class Graph:
    """A batch that knows how to move, as other libraries have them."""

    def __init__(self, x: Tensor, device: Any = None) -> None:
        self.x, self.device = x, device

    def to(self, device: torch.device) -> Graph:
        return Graph(self.x.to(device), device)


class Ragged(Graph):
    def to(self, device: Any, non_blocking: bool = False) -> Graph:
        return Ragged(self.x, (device, non_blocking))


class Anything(Graph):
    def to(self, *args: Any, **kwargs: Any) -> Graph:
        return Anything(self.x, (args, kwargs))


def test_batches_that_know_how_to_move_are_moved() -> None:
    meta, x, layer = torch.device("meta"), torch.tensor(VALUES), nn.Linear(1, 1)
    moved = move({"a": [Graph(x), Ragged(x)], "b": (Anything(x), x, layer, "text", torch.float32, Graph)}, meta)
    graph, ragged = moved["a"]
    assert (graph.device, graph.x.device, ragged.device) == (meta, meta, (meta, True))
    anything, tensor, *rest = moved["b"]
    assert anything.device == ((meta,), {"non_blocking": True}) and tensor.device == meta
    assert rest == [layer, "text", torch.float32, Graph] and layer.weight.device.type == "cpu"
    graph = Graph(x)
    assert cast(graph, BF16) is graph  # casts are not its business
