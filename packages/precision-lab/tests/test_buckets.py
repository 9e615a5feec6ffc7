import pytest
import torch
from torch import nn

from precision_core import Policy
from precision_lab import estimate
from precision_lab.buckets import Buckets


def sizes(layers, mode="32-true"):
    policy = Policy.parse(mode)
    return [bucket.nbytes for bucket in Buckets(nn.Sequential(*layers).to(policy.params), policy).tensors]


def test_the_first_bucket_is_small_the_others_large_and_all_gradients_have_one():
    layers = [nn.Linear(1024, 1024, bias=False) for _ in range(9)]  # 4 MiB each
    assert sizes(layers) == [4 * 2**20, 28 * 2**20, 4 * 2**20]
    assert sizes(layers, "bf16-true") == [2 * 2**20, 16 * 2**20]
    layers[0].weight.requires_grad_(False)
    assert sizes(layers) == [4 * 2**20, 28 * 2**20]


def test_buckets_are_of_one_dtype():
    buckets = Buckets(nn.Sequential(nn.Linear(8, 8, bias=False), nn.LayerNorm(8).double()), Policy.parse("32-true"))
    assert {bucket.dtype: bucket.numel() for bucket in buckets.tensors} == {torch.float32: 64, torch.float64: 16}


def make():
    model = nn.Linear(1000, 1000, bias=False)
    return model, torch.optim.SGD(model.parameters(), lr=0.1), [torch.ones(4, 1000)], lambda model, x: model(x).mean()


@pytest.mark.parametrize(
    ("mode", "megabytes"),
    [
        ("32-true", 4 + 4),  # a gradient and its bucket
        ("bf16-true", 2 + 2),
        ("bf16-master", 2 + 2 + 4),  # and what is sent, in float32
        ("params=bfloat16,grads=float32", 4 + 2 + 4),  # which wide gradients are made of
    ],
)
def test_a_step_has_a_bucket_and_what_is_sent_beside_gradients(mode, megabytes):
    (found,) = estimate(make, mode, strategy="ddp", devices=2).rows
    # beside them the batch, and what a product has while it runs
    assert found.grads + found.temporary == pytest.approx(megabytes * 1_000_000, abs=150_000)
    assert found.how == "traced on one device, with DDP's buckets of gradients"
