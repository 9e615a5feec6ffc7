import math

import pytest
import torch

from precision_lab.gpt import GPT, GPTConfig, rotate, rotation_table
from precision_lab.train import cross_entropy

SMALL = GPTConfig(width=32, layers=2, heads=2, context=16)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(SMALL)


def test_default_size():
    count = sum(param.numel() for param in GPT(GPTConfig()).parameters())
    assert 1_000_000 < count < 2_000_000


def test_a_later_byte_does_not_change_earlier_logits(model):
    ids = torch.randint(256, (2, 16))
    changed = ids.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.isclose(before[:, 9:], after[:, 9:]).all(dim=-1).any()  # and it does change all from there on


def test_head_and_embedding_are_one_weight(model):
    assert model.head.weight is model.embedding.weight


def test_an_untrained_model_knows_nothing(model):
    ids = torch.randint(256, (8, 17))
    assert abs(cross_entropy(model(ids[:, :-1]), ids[:, 1:]).item() - math.log(256)) < 0.2


def test_rotated_products_depend_on_the_distance_only():
    torch.manual_seed(0)
    query, key = torch.randn(8).double(), torch.randn(8).double()
    rotation = rotation_table(40, 8, torch.device("cpu"))
    queries, keys = rotate(query.expand(40, 8), rotation), rotate(key.expand(40, 8), rotation)
    products = queries @ keys.T
    for distance in (0, 3, 11):
        diagonal = products.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    assert products.std() > 0.1
    torch.testing.assert_close(queries.norm(dim=1), query.norm().expand(40), rtol=0, atol=1e-6)


def test_positions_stay_exact_in_half_precision():
    cos, sin = rotation_table(512, 8, torch.device("cpu"))
    assert cos.dtype == sin.dtype == torch.float32
    assert rotate(torch.ones(1, 512, 8, dtype=torch.bfloat16), (cos, sin)).dtype == torch.bfloat16
