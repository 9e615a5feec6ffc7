import sys
import textwrap

import pytest

from precision_lab.taskfile import TaskError, check_spec, guarded, load_make, users_traceback


@pytest.fixture(autouse=True)
def path(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(path, text, name="mine.py"):
    (path / name).write_text(textwrap.dedent(text))
    return name


GOOD = """
    import torch
    from helper import WIDTH

    def make():
        model = torch.nn.Linear(WIDTH, 1)
        return model, torch.optim.SGD(model.parameters()), [torch.ones(2, WIDTH)], lambda model, x: model(x).mean()

    other = make
"""


def test_a_function_of_a_file_is_found_and_imports_what_lies_beside_it(path):
    written(path, "WIDTH = 3", "helper.py")
    file = written(path, GOOD)
    for spec in (file, f"{file}:make", str(path / "mine.py:other"), "mine:make"):
        assert load_make(spec)().model.in_features == 3


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("gone.py:make", "there is no file 'gone.py'; precision new gone.py writes one"),
        ("a b", "expected a file that ends in .py"),
        ("mine.py:make()", "expected a file and a function in it"),
        (":make", "expected a file and a function in it"),
    ],
)
def test_a_spec_that_names_nothing_is_said(spec, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(").replace(")", r"\)")):
        check_spec(spec)


BAD = """
    import torch

    def inner():
        return torch.zeros(2) @ torch.zeros(3)

    def make():
        return inner()
"""


def test_an_error_shows_the_users_traceback_and_nothing_of_ours(path):
    make = load_make(written(path, BAD))
    with pytest.raises(TaskError) as caught:
        make()
    lines = str(caught.value).splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("RuntimeError: ")
    assert [line.split(",")[1] for line in lines if line.startswith("  File")] == [" line 8", " line 5"]
    assert "precision_lab" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import nowhere_at_all", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("def make(:", "SyntaxError: "),
        ("def other(): pass", "mine.py has no function 'make'; it has other"),
        ("def make(): return 3", "TypeError: make() returned an object of type int: expected precision_lab.Task"),
    ],
)
def test_each_mistake_is_the_users_and_is_named(path, text, words):
    with pytest.raises(TaskError) as caught:
        load_make(written(path, text))()
    assert words in str(caught.value)
    assert "precision_lab/" not in str(caught.value) and "importlib" not in str(caught.value)


def test_causes_are_shown_without_our_frames_as_well():
    def outer():
        try:
            guarded(lambda: 1 / 0)()
        except TaskError as error:
            raise KeyError("mine") from error

    with pytest.raises(KeyError) as caught:
        outer()
    text = users_traceback(caught.value)
    assert "ZeroDivisionError" in text and text.endswith("KeyError: 'mine'")
    assert "taskfile.py" not in text.replace("test_taskfile.py", "")
