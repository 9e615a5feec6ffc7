import copy
import io
import json

import pytest
from rich.console import Console

from precision_lab.against import changes, differences, print_against, read_record
from precision_lab.results import Comparison, Row


@pytest.fixture
def record():
    rows = [Row("32-true", "done", "", [2.0], [0.1], 1.9, 4, 4, 8, 2**20), Row("16-true", reason="slow")]
    return Comparison(1, 0, rows, environment={"torch": "2.13.0", "device_name": "x"}).as_dict()


def test_changes_are_old_and_new(record, tmp_path):
    old = copy.deepcopy(record)
    old["version"] = 1
    old["modes"][0] |= {"held_out_loss": 1.95, "peak_memory_bytes": 2**21}
    old["modes"][1] |= {"status": "failed"}
    old["environment"]["torch"] = "2.12.0"
    (tmp_path / "old.json").write_text(json.dumps(old))
    old = read_record(str(tmp_path / "old.json"))
    assert changes(record, old) == [
        ["32-true", "1.9500 -> 1.9000", "1.00", "2 MiB -> 1 MiB"],
        ["16-true", *["failed -> not run"] * 3],
    ]
    assert differences(record, old) == ["torch: 2.12.0 -> 2.13.0"]
    text = io.StringIO()
    print_against(record, old, Console(file=text, width=100))
    assert "1.9500 -> 1.9000" in text.getvalue() and "torch: 2.12.0 -> 2.13.0" in text.getvalue()


@pytest.mark.parametrize(("text", "words"), [(None, "cannot read"), ("{", "cannot read"), ("[]", "no compare.json")])
def test_what_is_no_record_is_said(text, words, tmp_path):
    path = tmp_path / "old.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_record(str(path))
