import pytest

import precision_lab.slow as slow
from precision_core import Policy


@pytest.mark.parametrize("mode", ["16-mixed", "16-true", "bf16-mixed; *.mlp: 16-true"])
def test_float16_is_slow_on_a_cpu_without_units(mode, monkeypatch):
    monkeypatch.setattr(slow, "cpu_has_float16", lambda: False)
    assert slow.slow_reason(Policy.parse(mode), "cpu") == "float16 has no units on this CPU, 9 to 26 times slower"
    assert slow.slow_reason(Policy.parse(mode), "cuda") is None
    monkeypatch.setattr(slow, "cpu_has_float16", lambda: True)
    assert slow.slow_reason(Policy.parse(mode), "cpu") is None


@pytest.mark.parametrize("mode", ["64-true", "32-true", "bf16-mixed", "bf16-true"])
def test_nothing_else_is_slow(mode, monkeypatch):
    monkeypatch.setattr(slow, "cpu_has_float16", lambda: False)
    assert slow.slow_reason(Policy.parse(mode), "cpu") is None


def test_torch_can_be_asked():
    assert slow.cpu_has_float16() in (True, False)
