import torch

from precision_lab.text import CHARACTERS, read_text, split_text


def test_text_has_the_promised_length():
    assert CHARACTERS == 450_000
    assert len(read_text()) == 450_000


def test_split_is_the_whole_text_in_two_disjoint_parts():
    training, held_out = split_text()
    text = read_text().encode()
    assert bytes(torch.cat([training, held_out]).tolist()) == text
    assert abs(len(held_out) - len(text) / 10) < 1
    # Disjoint in content as well: no window of the held-out part is a copy of a training window.
    windows = {bytes(held_out[i : i + 400].tolist()) for i in range(0, len(held_out) - 400, 400)}
    known = text[: len(training)]
    assert sum(window in known for window in windows) == 0
