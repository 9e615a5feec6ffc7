"""Scripts as people write them: each runs as `python script.py` would, is ended after some steps, and reported."""

from __future__ import annotations

import json
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from precision_lab.auditing.script import Outcome, audit_script
from precision_lab.cli import main

HEAD = """
import sys
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)


def step(scale=1.0):
    optimizer.zero_grad()
    loss = model(torch.randn(4, 8)).square().mean() * scale
    loss.backward()
    optimizer.step()
    return loss


"""


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Modules that a script imports are left out of later tests; torch's generator is as it was."""
    modules, state = set(sys.modules), torch.get_rng_state()
    yield
    torch.set_rng_state(state)
    for name in set(sys.modules) - modules:
        if not name.startswith("torch"):
            del sys.modules[name]


def audited(folder: Path, text: str, *arguments: str, steps: int | None = 2, head: bool = True) -> Outcome:
    script = folder / "train.py"
    script.write_text((HEAD if head else "") + textwrap.dedent(text))
    before = list(sys.argv), list(sys.path), sys.modules["__main__"]
    outcome = audit_script(str(script), list(arguments), steps)
    assert (list(sys.argv), list(sys.path), sys.modules["__main__"]) == before
    return outcome


def ended_at(folder: Path, text: str, *arguments: str, steps: int | None = 2, head: bool = True) -> int:
    outcome = audited(folder, text, *arguments, steps=steps, head=head)
    assert outcome.traceback == ""
    assert outcome.exit_code == 0
    assert outcome.report.at("warning") == []
    return outcome.report.record.steps


# ---------------------------------------------------------------- ways to run a loop


def test_an_endless_script_is_ended(tmp_path: Path) -> None:
    assert ended_at(tmp_path, "while True:\n    step()\n") == 2


def test_steps_can_be_chosen(tmp_path: Path) -> None:
    assert ended_at(tmp_path, "while True:\n    step()\n", steps=5) == 5


def test_all_steps_run_to_the_end(tmp_path: Path) -> None:
    text = f"for _ in range(4):\n    step()\nopen({str(tmp_path / 'end')!r}, 'w').close()\n"
    assert ended_at(tmp_path, text, steps=None) == 4
    assert (tmp_path / "end").exists()


def test_a_script_that_ends_before_says_so(tmp_path: Path) -> None:
    outcome = audited(tmp_path, "step()\n")
    assert outcome.report.record.steps == 1
    assert "the script ended after 1 training steps" in outcome.report.unseen


def test_arguments_name_and_file_are_the_scripts(tmp_path: Path) -> None:
    text = """
    import argparse, os
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float)
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    assert options.lr == 0.5 and options.steps == 7, options
    assert sys.argv[0].endswith("train.py") and os.path.isabs(__file__)

    def main():
        for _ in range(options.steps):
            step()
        return 0

    if __name__ == "__main__":
        sys.exit(main())
    """
    assert ended_at(tmp_path, text, "--lr", "0.5", "--steps", "7") == 2


def test_files_beside_the_script_are_imported(tmp_path: Path) -> None:
    (tmp_path / "beside_the_script.py").write_text(HEAD)
    text = "from beside_the_script import step\nimport beside_the_script as b\nwhile True:\n    b.step()\n"
    assert ended_at(tmp_path, text, head=False) == 2


def test_a_module_that_trains_when_it_is_imported(tmp_path: Path) -> None:
    (tmp_path / "trains_at_import.py").write_text(HEAD + "def run():\n    while True:\n        step()\n\nrun()\n")
    assert ended_at(tmp_path, "import trains_at_import\n", head=False) == 2


def test_a_generator_of_steps(tmp_path: Path) -> None:
    text = """
    def losses():
        try:
            while True:
                yield step().item()
        finally:
            print("closed")

    for loss in losses():
        pass
    """
    assert ended_at(tmp_path, text) == 2


def test_accumulation_counts_the_optimizers_steps(tmp_path: Path) -> None:
    text = """
    number = 0
    while True:
        for _ in range(4):
            (model(torch.randn(4, 8)).square().mean() / 4).backward()
            number += 1
            assert number <= 8
        optimizer.step()
        optimizer.zero_grad()
    """
    outcome = audited(tmp_path, text)
    assert outcome.traceback == ""
    assert outcome.report.record.steps == 2
    assert outcome.report.record.micro_batches["0.weight"] == 4


def test_a_closure_ends_after_its_step(tmp_path: Path) -> None:
    text = """
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(4, 8)).square().mean()
        loss.backward()
        calls.append(len(ends))
        return loss

    ends = []
    while True:
        optimizer.step(closure)
        ends.append(len(calls))
        assert len(ends) <= 2
    """
    text = "del optimizer\n" + textwrap.dedent(text)
    outcome = audited(tmp_path, text)
    assert outcome.traceback == ""
    assert outcome.report.record.steps == 2
    assert outcome.report.at("warning") == []
    assert outcome.report.record.count("backward") >= 4  # both steps ran their closures


def test_both_optimizers_of_a_gan_step_twice(tmp_path: Path) -> None:
    text = """
    other = nn.Linear(2, 1)
    second = torch.optim.Adam(other.parameters(), lr=1e-3)
    while True:
        for _ in range(3):
            second.zero_grad()
            other(model(torch.randn(4, 8)).detach()).mean().backward()
            second.step()
        optimizer.zero_grad()
        other(model(torch.randn(4, 8))).mean().backward()
        optimizer.step()
    """
    outcome = audited(tmp_path, text)
    assert outcome.report.at("warning") == []
    names = [event.name for event in outcome.report.record.of("step")]
    assert names == ["Adam", "Adam", "Adam", "SGD"] * 2


def test_an_optimizer_that_never_steps_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    text = "unused = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0)\nwhile True:\n    step()\n"
    outcome = audited(tmp_path, text)
    assert outcome.report.record.steps == 2
    assert outcome.report.record.count("step") == 20


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=[pytest.mark.full, pytest.mark.slow_start])])
def test_workers_of_a_data_loader(tmp_path: Path, context: str) -> None:
    text = f"""
    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 64

        def __getitem__(self, index):
            return torch.full((8,), float(index)) / 64

    def main():
        loader = torch.utils.data.DataLoader(Data(), 4, num_workers=2, multiprocessing_context={context!r})
        for batch in loader:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()

    if __name__ == "__main__":
        main()
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)  # of a process with threads, in Python 3.12
        assert ended_at(tmp_path, text) == 2


# ---------------------------------------------------------------- ways to end


@pytest.mark.parametrize("catches", ["Exception", "BaseException"])
def test_a_script_that_catches_everything_in_its_loop(tmp_path: Path, catches: str) -> None:
    text = f"""
    for number in range(30):
        try:
            step()
        except {catches}:
            pass
    """
    assert ended_at(tmp_path, text) == 2


def test_a_script_that_saves_whatever_happens(tmp_path: Path) -> None:
    text = f"""
    try:
        while True:
            step()
    except BaseException as error:
        torch.save(model.state_dict(), {str(tmp_path / "last.pt")!r})
        raise RuntimeError("training failed") from error
    """
    assert ended_at(tmp_path, text) == 2
    assert (tmp_path / "last.pt").exists()


@pytest.mark.parametrize(("code", "expected"), [("0", 0), ("None", 0), ("3", 3), ("'no data'", 1)])
def test_exit_codes(tmp_path: Path, code: str, expected: int) -> None:
    outcome = audited(tmp_path, f"step()\nsys.exit({code})\n")
    assert outcome.exit_code == expected
    assert outcome.traceback == ("" if expected == 0 else f"the script ended with {code}")


def test_an_argument_error_is_the_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = audited(tmp_path, "import argparse\nargparse.ArgumentParser().parse_args()\n", "--what")
    assert outcome.exit_code == 2
    assert "unrecognized arguments: --what" in capsys.readouterr().err


def test_an_interrupted_script_is_reported(tmp_path: Path) -> None:
    outcome = audited(tmp_path, "step()\nraise KeyboardInterrupt\n")
    assert (outcome.interrupted, outcome.exit_code, outcome.traceback) == (True, 130, "")
    assert "interrupted after 1 training steps" in outcome.report.unseen


def test_an_error_shows_the_scripts_frames_alone(tmp_path: Path) -> None:
    outcome = audited(tmp_path, "def deep():\n    return model(torch.ones(4, 3))\n\nstep()\ndeep()\n")
    assert "return model(torch.ones(4, 3))" in outcome.traceback
    assert "runpy" not in outcome.traceback
    assert "precision_lab" not in outcome.traceback


def test_a_syntax_error_is_shown(tmp_path: Path) -> None:
    outcome = audited(tmp_path, "while True\n", head=False)
    assert "SyntaxError" in outcome.traceback


# ---------------------------------------------------------------- the command


FAILS = """
scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
scaler.scale(model(torch.randn(4, 8)).square().mean()).backward()
scaler.unscale_(optimizer)
scaler.unscale_(optimizer)  # twice
"""


def test_findings_come_before_the_traceback(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(HEAD + FAILS)
    result = CliRunner().invoke(main, ["audit", str(script)])
    assert result.exit_code == 2
    assert "[unscaled-twice]" in result.output
    assert result.output.index("[unscaled-twice]") < result.output.index("RuntimeError: unscale_() has already")


def test_json_is_all_that_stands_on_stdout(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(HEAD + "print('hello')\nwhile True:\n    (step(), print('x'))\n")
    result = CliRunner().invoke(main, ["audit", "--json", str(script)])
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert (report["steps"], report["findings"]) == (2, [])


@pytest.mark.parametrize(("fail_on", "code"), [("never", 0), ("error", 1), ("warning", 1)])
def test_fail_on(tmp_path: Path, fail_on: str, code: int) -> None:
    script = tmp_path / "train.py"
    script.write_text(HEAD + "while True:\n    model(torch.ones(4, 8)).sum().backward()\n    optimizer.step()\n")
    result = CliRunner().invoke(main, ["audit", "--fail-on", fail_on, str(script)])
    assert "gradients-kept" in result.output
    assert result.exit_code == code
