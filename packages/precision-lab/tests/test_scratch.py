"""What no operation shows, against what torch's allocator gives out."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from precision_lab import scratch
from precision_lab.scratch import bytes_behind, scratch_bytes
from precision_lab.tracker import fake_mode

aten = torch.ops.aten
CONVOLUTION = ([2, 2], [1, 1], [1, 1], True, [0, 0], 1)
CALLS = {
    "mm": lambda dtype: (aten.mm.default, (torch.ones(48, 64, dtype=dtype), torch.ones(40, 64, dtype=dtype).t())),
    "convolution": lambda dtype: (
        aten.convolution.default,
        (torch.ones(2, 16, 8, 8, dtype=dtype), torch.ones(16, 3, 4, 4, dtype=dtype), None, *CONVOLUTION),
    ),
    "mse_loss": lambda dtype: (aten.mse_loss.default, (torch.ones(30, 20, dtype=dtype), torch.ones(20, dtype=dtype))),
    "mean": lambda dtype: (aten.mean.dim, (torch.ones(3, 90, dtype=dtype), [1])),
    "tanh": lambda dtype: (aten.tanh.default, (torch.ones(30, dtype=dtype),)),
}


def most_allocated(func, args):
    func(*args)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = func(*args)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most, result


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", CALLS)
def test_results_and_scratch_are_what_is_allocated(name, dtype):
    func, args = CALLS[name](dtype)
    most, result = most_allocated(func, args)
    with fake_mode():
        func, args = CALLS[name](dtype)
        fake = func(*args)
    behind = bytes_behind(func, args, fake)
    found = fake.nbytes + behind + scratch_bytes(func, args, {}, fake)
    assert found <= most <= found + 32  # a mean has numbers of its own
    assert fake.nbytes + behind == result.untyped_storage().nbytes()


def test_a_transposed_convolution_has_some_in_every_dtype():
    func, args = CALLS["convolution"](torch.float32)
    assert scratch_bytes(func, args, {}, func(*args)) > 10_000


@pytest.mark.parametrize("loss", [F.mse_loss, F.smooth_l1_loss, F.binary_cross_entropy, F.soft_margin_loss, F.l1_loss])
def test_what_losses_keep_behind_their_value(loss):
    func = getattr(aten, loss.__name__, aten.mean)
    for reduction in ("mean", "none"):
        result = loss(torch.rand(100), torch.rand(100), reduction=reduction)
        kept = bytes_behind(func.default, (torch.rand(100), torch.rand(100)), result)
        assert result.nbytes + kept == result.untyped_storage().nbytes()


def test_large_products_are_not_run():
    with fake_mode():
        large = torch.ones(2**20, 2**20)
        assert scratch_bytes(aten.mm.default, (large, large), {}, large) == 0
        assert scratch_bytes(aten.mean.dim, (large, [1]), {}, large[0]) == 0


def test_a_product_of_one_shape_is_run_once(monkeypatch):
    runs = []
    monkeypatch.setattr(scratch, "_known", {})
    monkeypatch.setattr(scratch, "_most_beside_results", lambda call: runs.append(call()) or 7)
    for size in (3, 3, 4):
        args = (torch.ones(size, 5), torch.ones(5, 2))
        assert scratch_bytes(aten.mm.default, args, {}, aten.mm(*args)) == 7
    assert [tuple(run.shape) for run in runs] == [(3, 2), (4, 2)]
