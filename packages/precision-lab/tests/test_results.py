import json

import pytest

from precision_core import Policy
from precision_lab.results import Comparison, Row, policy_as_dict


def done(mode, losses, seconds):
    return Row(
        mode, "done", losses=losses, step_seconds=seconds, held_out_loss=2.0, policy=policy_as_dict(Policy.parse(mode))
    )


@pytest.fixture
def comparison():
    rows = [
        done("64-true", [4.0, 2.0], [0.3, 0.5]),
        done("32-true", [4.0, 2.1], [0.1, 0.3]),
        Row("16-mixed", "failed", "broke", losses=[4.0], step_seconds=[0.1]),
        Row("16-true", reason="slow"),
    ]
    return Comparison(2, 0, rows, {"device": "cpu"})


def test_drift_and_time_ratio(comparison):
    double, single, failed, not_run = comparison.rows
    assert comparison.drift(single) == pytest.approx(0.05)
    assert comparison.drift(double) == 0
    assert comparison.time_ratio(double) == pytest.approx(2)
    for row in (failed, not_run):
        assert comparison.drift(row) is comparison.time_ratio(row) is row.train_loss is None
    assert comparison.failed


def test_without_references_there_is_nothing_to_compare_with(comparison):
    comparison.rows[0].status = "failed"
    assert comparison.drift(comparison.rows[1]) is None
    del comparison.rows[1]
    assert comparison.time_ratio(comparison.rows[0]) is None


def test_train_loss_is_the_mean_of_the_last_tenth():
    row = done("32-true", [float(step) for step in range(40)], [0.1] * 40)
    assert row.train_loss == pytest.approx((36 + 37 + 38 + 39) / 4)
    assert done("32-true", [3.0, 2.0], [0.1, 0.1]).train_loss == 2


def test_as_dict_is_json(comparison):
    comparison.rows.append(Row("of-a-package", reason="slow"))
    comparison.rows.append(done("bf16-mixed; *.norm: 32-true", [4.0, 2.2], [0.1, 0.1]))
    record = comparison.as_dict({"batch": 4})
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    policy = record["modes"][-1]["policy"]
    assert policy["compute"] == "bfloat16"
    assert policy["master"] is None
    assert policy["exceptions"]["*.norm"]["compute"] == "float32"
    assert record["modes"][-2]["policy"] is None  # only its plugin knows
    assert record["modes"][2] | {"status": "failed", "reason": "broke", "drift": None} == record["modes"][2]
