"""Objects on their way to other ranks: tensors leave one device, wherever they are, and arrive on another."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import nn

from precision_core.strategies.transfer import pack, unpack

CPU, META = torch.device("cpu"), torch.device("meta")


class Custom:
    """Any object of a user's."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


def sent(data: Any, *, here: torch.device = CPU, there: torch.device = CPU) -> Any:
    """Returns what arrives `there`, after the way through the pickle of torch.distributed."""
    return unpack(pickle.loads(pickle.dumps(pack(data, here))), there)


def test_values_arrive_with_dtype_shape_and_flags() -> None:
    x = torch.arange(6, dtype=torch.float64).reshape(2, 3)
    arrived = sent(
        Custom(x=x, t=x.t(), half=x.half(), trains=torch.ones(2, requires_grad=True), empty=torch.empty(0, 3))
    )
    for name, wanted in {"x": x, "t": x.t(), "half": x.half(), "empty": torch.empty(0, 3)}.items():
        found = getattr(arrived, name)
        assert found.dtype == wanted.dtype and torch.equal(found, wanted) and not found.requires_grad
    assert arrived.trains.requires_grad and arrived.trains.is_leaf


def test_tensors_in_custom_objects_arrive_on_the_device_of_who_receives() -> None:
    data = Custom(inner=Custom(x=torch.ones(3)), listed=[{"y": torch.ones(4)}], model=nn.Linear(2, 2))
    arrived = sent(data, there=META)
    assert arrived.inner.x.device == arrived.listed[0]["y"].device == arrived.model.weight.device == META
    assert (arrived.inner.x.shape, arrived.listed[0]["y"].shape) == ((3,), (4,))


def test_what_is_not_on_the_senders_device_stays_where_it_is() -> None:
    data = Custom(state=torch.get_rng_state(), shape=torch.empty(3, device=META))
    arrived = sent(data, here=torch.device("cuda"), there=META)
    assert arrived.state.device == CPU and torch.equal(arrived.state, data.state)
    assert arrived.shape.device == META


def test_parameters_arrive_as_parameters_in_a_module_that_computes() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    model[0].bias.requires_grad_(False)
    arrived = sent(Custom(model=model)).model
    x = torch.randn(3, 4)
    assert torch.equal(arrived(x), model(x))
    assert [type(p) for p in arrived.parameters()] == [nn.Parameter] * 4
    assert [p.requires_grad for p in arrived.parameters()] == [True, False, True, True]


def test_one_tensor_in_two_places_is_sent_once_and_stays_one() -> None:
    x = torch.ones(1000)
    data = Custom(first=x, second=[x, x.clone()])
    assert len(pack(data, CPU)[1]) == 2
    arrived = sent(data)
    assert arrived.first is arrived.second[0] and arrived.first is not arrived.second[1]


def test_attributes_of_tensors_arrive() -> None:
    x = torch.ones(2)
    x.label = "of mine"  # type: ignore[attr-defined]
    assert sent(Custom(x=x)).x.label == "of mine"


def test_what_does_not_pickle_says_so() -> None:
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pack(Custom(function=lambda: None), CPU)
