import io
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from precision_lab.process import ChildFailed
from precision_lab.progress import make_progress
from precision_lab.results import Comparison, Row
from precision_lab.resume import Saved
from precision_lab.turns import run

SECONDS = {"64-true": 0.2, "32-true": 0.1, "fails": 0.1, "full": 0.1}


class Fake:
    """A run whose loss is that of its step and mode, and whose time is told; it notes what it is told."""

    def __init__(self, job, told, log):
        self.job, self.log, self.step, self.told = job, log, 0, told
        self.queue = []
        if job.resume:
            self.step = int(Path(job.resume).read_text())
        self.log.append((job.mode, job.seed, "starts", self.step))

    def tell(self, command):
        self.queue.append(command)

    def events(self, until=None):
        if until == "ready":
            yield {"device": "cpu"}
            yield {"ready": self.step}
            return
        verb, _, argument = self.queue.pop().partition(" ")
        self.log.append((self.job.mode, self.job.seed, verb, argument))
        if verb == "save":
            Path(argument).write_text(str(self.step))
            yield {"saved": argument}
        elif verb == "finish":
            yield {"held_out_loss": 2.0 + self.job.seed, "parameter_bytes": 4}
            yield {"finished": True}
        for _ in range(min(int(argument), self.job.steps - self.step) if verb == "steps" else 0):
            self.step += 1
            if self.step == 4 and self.job.mode in ("fails", "full"):
                raise ChildFailed("CUDA out of memory" if self.job.mode == "full" else "ValueError: no")
            yield {"step": self.step, "loss": 1.0 / self.step, "seconds": SECONDS[self.job.mode]}

    def close(self):
        self.log.append((self.job.mode, self.job.seed, "close", ""))


def compared(modes, steps=20, log=None, repeats=(), start=None, **options):
    rows = [Row(mode) for mode in modes]
    comparison = Comparison(steps, 0, rows, repeats=[Row(mode, seed=s, repeat=True) for mode, s in repeats])
    log = [] if log is None else log
    with make_progress(Console(file=io.StringIO()), [*rows, *comparison.repeats], steps) as progress:
        run(comparison, "cpu", progress, start=start or (lambda job, told: Fake(job, told, log)), **options)
    return comparison, log


def test_modes_take_turns_back_and_forth():
    """Two steps each to warm up, then turns whose length the slowest mode decides, always the same."""
    comparison, log = compared(["64-true", "32-true"], steps=10)
    turns = [(mode, int(argument)) for mode, _, verb, argument in log if verb == "steps"]
    there, back = ["64-true", "32-true"], ["32-true", "64-true"]
    assert [mode for mode, _ in turns] == [*there, *back, *there, *back]
    assert [steps for _, steps in turns] == [2, 2, *[3] * 6]  # 0.25 s at 0.2 s a step, three at least
    assert comparison.block == 3 and comparison.environment["device"] == "cpu"
    assert [row.status for row in comparison.rows] == ["done", "done"]
    assert all(len(row.losses) == 10 and row.held_out_loss == 2.0 for row in comparison.rows)
    assert comparison.time_ratio(comparison.rows[0]) == pytest.approx(2)


def test_one_after_another_where_that_is_asked_for():
    comparison, log = compared(["64-true", "32-true"], steps=10, sequential=True)
    assert [mode for mode, _, verb, _ in log if verb in ("starts", "close")] == ["64-true"] * 2 + ["32-true"] * 2
    assert comparison.block is None


def test_what_fails_is_a_row_and_the_others_go_on():
    comparison, _ = compared(["fails", "32-true"])
    fails, good = comparison.rows
    assert (fails.status, fails.reason, len(fails.losses)) == ("failed", "ValueError: no", 3)
    assert (good.status, len(good.losses)) == ("done", 20)


def test_a_mode_for_which_there_is_no_memory_beside_the_others_is_tried_again_alone():
    class Crowded(Fake):
        """Has no memory only where 32-true is in it."""

        def events(self, until=None):
            if ("32-true", 0, "close", "") in self.log:
                self.job = replace(self.job, mode="64-true")
            yield from super().events(until)

    comparison, log = compared(["full", "32-true"])
    full = comparison.rows[0]
    assert (full.status, full.reason, len(full.losses)) == ("failed", "CUDA out of memory", 3)
    assert sum(entry[:3] == ("full", 0, "starts") for entry in log) == 2
    log = []
    comparison, _ = compared(["full", "32-true"], start=lambda job, told: Crowded(job, told, log))
    full = comparison.rows[0]
    assert (full.status, len(full.losses), full.reason) == ("done", 20, "")
    assert full.note == "trained alone, there was no memory for all modes at once"
    assert sum(entry[2] == "starts" for entry in compared(["full"])[1]) == 1  # it was alone


@pytest.mark.parametrize(("named", "status"), [(True, "failed"), (False, "not run")])
def test_what_the_task_does_not_allow_has_failed_only_where_it_was_named(named, status):
    class Refuses(Fake):
        def events(self, until=None):
            yield {"refused": "no linear layer"}
            raise ChildFailed("precision_lab.loop.Refused: no linear layer")

    row = Row("32-true")
    comparison = Comparison(1, 0, [row], named=named)
    with make_progress(Console(file=io.StringIO()), [row], 1) as progress:
        run(comparison, "cpu", progress, start=lambda job, told: Refuses(job, told, []))
    assert (row.status, row.reason) == (status, "no linear layer")


def test_other_seeds_follow_one_by_one_if_the_first_finished():
    comparison, log = compared(["32-true", "fails"], repeats=[("32-true", 1), ("32-true", 2), ("fails", 1)])
    assert comparison.spread() == pytest.approx(1.0)  # held-out 2, 3, 4
    assert [row.status for row in comparison.repeats] == ["done", "done", "not run"]
    assert comparison.repeats[2].reason == "fails did not finish with the first seed"
    starts = [(mode, seed) for mode, seed, verb, _ in log if verb == "starts"]
    assert starts == [("32-true", 0), ("fails", 0), ("32-true", 1), ("32-true", 2)]


class Interrupted(Fake):
    """Ctrl-C in the middle of the second turn of 32-true."""

    def events(self, until=None):
        for event in super().events(until):
            yield event
            if event.get("step") == 3 and self.job.mode == "32-true":
                raise KeyboardInterrupt


def test_interrupted_it_goes_on_where_it_was(tmp_path):
    options = {"steps": 20}
    comparison = Comparison(20, 0, [Row("64-true"), Row("32-true"), Row("16-true", reason="slow")])
    log = []
    saved = Saved(tmp_path, options)
    console = Console(file=io.StringIO())
    with pytest.raises(KeyboardInterrupt), make_progress(console, comparison.rows, 20) as progress:
        run(comparison, "cpu", progress, start=lambda job, told: Interrupted(job, told, log), saved=saved)
    assert [verb for mode, _, verb, _ in log if mode == "64-true"][-2:] == ["save", "close"]

    again = Comparison(20, 0, [Row("64-true"), Row("32-true"), Row("16-true", reason="slow")])
    saved = Saved(tmp_path, options)
    assert saved.read(again) == "going on where it was interrupted: 5 of 60 steps are done"
    log.clear()
    with make_progress(console, again.rows, 20) as progress:
        run(again, "cpu", progress, start=lambda job, told: Fake(job, told, log), saved=saved)
    assert [entry for entry in log if entry[2] == "starts"] == [
        ("64-true", 0, "starts", 2),
        ("32-true", 0, "starts", 3),
    ]
    for row in again.rows[:2]:
        assert row.losses == [1.0 / step for step in range(1, 21)]
    assert again.block == comparison.block == 3
    saved.clear()
    assert not list(tmp_path.iterdir())


def test_another_command_starts_anew_and_says_why(tmp_path):
    comparison = Comparison(4, 0, [Row("32-true", "done", losses=[1.0] * 4)])
    Saved(tmp_path, {"steps": 4, "seed": 0}).write(comparison)
    fresh = Comparison(4, 0, [Row("32-true")])
    said = Saved(tmp_path, {"steps": 4, "seed": 1}).read(fresh)
    assert said == "an interrupted run in this folder had another seed: starting anew" and not fresh.rows[0].losses
    assert Saved(tmp_path, {"steps": 4, "seed": 0}).read(fresh) and fresh.rows[0].losses == [1.0] * 4
    (tmp_path / "resume" / "resume.json").write_text("{")
    assert Saved(tmp_path, {"steps": 4, "seed": 0}).read(Comparison(4, 0, [Row("32-true")])) == ""


@pytest.mark.full
def test_a_fork_told_what_to_do_trains_as_one_that_trains_at_once_and_goes_on_from_what_it_saved(fork, tmp_path):
    """The real thing: bit for bit, whatever the turns, and over a checkpoint."""
    from precision_lab.loop import Job

    def losses(events):
        return [event["loss"] for event in events if "loss" in event]

    job = Job("bf16-mixed", 5, 0, "cpu")
    with closing(fork(job, False)) as child:
        expected = losses(child.events())
    with closing(fork(job, True)) as child:
        list(child.events("ready"))
        child.tell("steps 2")
        mine = losses(child.events("paused"))
        child.tell(f"save {tmp_path / 'a.ckpt'}")
        assert list(child.events("saved"))
        child.tell("steps 1")
        mine += losses(child.events("paused"))
    assert mine == expected[:3]
    with closing(fork(Job("bf16-mixed", 5, 0, "cpu", resume=str(tmp_path / "a.ckpt")), True)) as child:
        assert list(child.events("ready"))[-1] == {"ready": 2}
        child.tell("steps 9")
        assert losses(child.events("paused")) == expected[2:]
        child.tell("finish")
        assert list(child.events("finished"))[-1] == {"finished": True}
