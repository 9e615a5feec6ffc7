"""The contest of the candidates of `precision choose`: the race, the judgement, and exceptions for those that fail."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from precision_lab.choice import Candidate, Choice
from precision_lab.disqualified import disqualify, is_hopeless, losses_of, swallowed_by_module
from precision_lab.evidence import LOOKS, weigh
from precision_lab.exceptions import Trouble, propose, spelled
from precision_lab.machine import describe_machine
from precision_lab.process import ChildFailed
from precision_lab.results import BASELINE, REFERENCE, Comparison, Row, percent
from precision_lab.runs import Runs
from precision_lab.sensitivity import Layer
from precision_lab.taskfile import TaskError

RACERS_SEEDS = 3
FRESH = 1000
"""The judgement's seeds start so many above the race's."""
TIME_COUNTS, FASTEST, SLOWEST = 0.1, 0.5, 3.0
"""Where memory is preferred, bytes are multiplied by this power of the time, between these limits: a mode that is three
times as slow has to save 12 % more. It is at most 6 ** 0.1 = 1.2 times the bytes that the answer may miss."""


class Contest:
    """Fills in a choice: its candidates, judged, and the precision."""

    def __init__(self, choice: Choice, runs: Runs, seed: int, limit: int) -> None:
        self._choice, self._runs = choice, runs
        self._seed, self._limit = seed, limit
        self._base_bytes = 0.0
        self._measured = False
        self._unknown: list[str] = []
        self._layers: list[Layer] = []

    def run(self, rows: Sequence[Row]) -> None:
        """Judges the modes of `rows`, those without a reason not to run.

        Raises:
            TaskError: the user's code raised before any training.
            KeyboardInterrupt: Ctrl-C; what was trained is kept by the runs.
        """
        choice = self._choice
        for reason in dict.fromkeys(row.reason for row in rows if row.reason):
            choice.untested.append(f"{', '.join(row.mode for row in rows if row.reason == reason)}: {reason}")
        modes = [row.mode for row in rows if not row.reason and row.mode not in (BASELINE, REFERENCE)]
        base = Candidate(BASELINE, judged="reference")
        found = [Candidate(mode) for mode in modes]
        self._weigh_bytes([base, *found])
        runners = [each for each in found if self._is_cheaper(each, base)]
        self._runs.sequential = self._runs.sequential or _is_tight([base, *runners])
        race = self._runs.race([BASELINE, *(each.precision for each in runners)], choice.race_steps, self._race_seeds)
        choice.model = str(self._runs.environment.get("model", ""))
        self._untested()
        if race.find(BASELINE) is None:
            row = race.rows[0]
            base.judged, base.reason = "failed", f"{row.reason}: nothing to measure the others by"
            choice.candidates = [base, *found]
            return
        self._after_race(race, base, runners, found)
        choice.candidates = [each for each in found if each not in runners]
        out = [each for each in runners if each.reason]
        choice.candidates += out
        queue = [each for each in runners if each not in out]
        for each in [each for each in out if each.judged != "not run"]:
            queue += self._with_exceptions(each, race)
        self._judge(queue, base)

    @property
    def _race_seeds(self) -> list[int]:
        return [self._seed + n for n in range(RACERS_SEEDS)]

    # ---------------------------------------------------------------- 1. candidates

    def _weigh_bytes(self, candidates: Sequence[Candidate]) -> None:
        rows = self._runs.estimate([each.precision for each in candidates])
        for each, row in zip(candidates, rows, strict=True):
            each.bytes = None if row.reason else row.peak
            if row.reason and not each.reasons:
                self._unknown.append(each.precision)

    def _is_cheaper(self, each: Candidate, base: Candidate) -> bool:
        """Whether it may be the answer, as far as bytes say; one that may not has its reason."""
        room = self._choice.fit
        if each.bytes is None or base.bytes is None:
            return True
        if room is not None and each.bytes > room:
            each.reason = f"does not fit: it needs {each.bytes:,} bytes"
        elif self._choice.prefer == "memory" and each.bytes >= base.bytes and self._fits(base):
            each.reason = "saves no memory"
        return not each.reason

    def _fits(self, each: Candidate) -> bool:
        return self._choice.fit is None or each.bytes is None or each.bytes <= self._choice.fit

    def _cost(self, each: Candidate) -> tuple[float, float]:
        ratio, base = each.time_ratio or 1.0, self._base_bytes or 1.0
        size = (each.bytes or base) / base
        if self._choice.prefer == "speed":
            return round(ratio, 2), size
        return size * min(max(ratio, FASTEST), SLOWEST) ** TIME_COUNTS, ratio

    # ---------------------------------------------------------------- 3. race

    def _after_race(
        self, race: Comparison, base: Candidate, runners: Sequence[Candidate], found: Sequence[Candidate]
    ) -> None:
        base.time_ratio = 1.0
        self._measured = any(each.bytes is None for each in (base, *runners))
        if self._measured:  # some code needs values: what was measured counts, for all of them
            self._choice.bytes_are = "parameters', gradients' and optimizer's"
            for each in found:
                each.bytes = None
        for each in (base, *runners):
            row = race.find(each.precision)
            if row is None:
                failed = next(row for row in race.rows if row.mode == each.precision)
                each.judged, each.reason = "failed", f"{failed.reason} (race)"
                continue
            if self._measured:
                each.bytes = _kept_bytes(row)
            each.time_ratio = race.time_ratio(row)
            if each is base:
                continue
            all_rows = [other for other in (*race.rows, *race.repeats) if other.mode == each.precision]
            disqualify(each, all_rows)
            if each.judged == "not run" and is_hopeless(race, each.precision):
                each.judged = "worse"
                each.reason = f"{race.in_spreads(row):.1f} standard deviations of 32-true after {race.steps} steps"
            if each.judged == "not run" and self._choice.prefer == "speed" and (each.time_ratio or 1.0) >= 1.0:
                each.reason = "saves no time"
        self._base_bytes = float(base.bytes or 0)

    # ---------------------------------------------------------------- 4. judgement

    def _judge(self, queue: list[Candidate], base: Candidate) -> None:
        choice = self._choice
        while queue:
            queue.sort(key=self._cost)
            each = queue.pop(0)
            choice.candidates.append(each)
            if not self._is_cheaper(each, base):
                continue
            rows = self._confirm(each)
            if each.judged == "safe" and choice.prefer == "speed" and (each.time_ratio or 1.0) >= 1.0:
                each.reason = "saves no time"
            elif each.judged == "safe":
                choice.precision = each.precision
                break
            else:
                queue += self._with_exceptions(each, None, rows)
        for each in queue:
            each.reason = each.reason or f"not judged: {choice.precision} is cheaper"
        choice.candidates += [*queue, base]
        if not choice.precision and self._fits(base):
            choice.precision = BASELINE

    def _confirm(self, each: Candidate) -> list[Row]:
        """Trains and judges: more seeds while it is undecided."""
        rows, base = list[Row](), list[Row]()
        for count in (look for look in LOOKS if look <= self._limit):
            seeds = [self._seed + FRESH + n for n in range(count)]
            rows = self._runs.single(each.precision, self._choice.steps, seeds)
            each.judged = "not run"
            disqualify(each, rows)
            if each.judged != "not run":
                return rows
            base = self._runs.single(BASELINE, self._choice.steps, seeds)
            if any(row.status != "done" for row in base):
                each.judged, each.reason = "undecided", "32-true itself failed"
                return rows
            if each.bytes is None:
                each.bytes = _kept_bytes(rows[0])
            if each.time_ratio is None:
                medians = [statistics.median(row.median_step_seconds or 0.0 for row in some) for some in (rows, base)]
                each.time_ratio = medians[0] / medians[1] if medians[1] else None
            each.evidence = weigh(losses_of(rows), losses_of(self._runs.known(BASELINE, self._choice.steps)))
            each.judged = each.evidence.answer
            if each.judged != "undecided":
                break
        evidence = each.evidence
        if evidence is not None and each.judged != "safe":
            each.reason = (
                f"held-out {evidence.difference:+.3g} +- {evidence.margin:.2g} with {evidence.seeds} seeds, where "
                f"32-true's standard deviation is {evidence.spread:.2g}{_frozen(rows[0], base[0])}"
            )
        return rows

    def _with_exceptions(self, each: Candidate, race: Comparison | None, rows: Sequence[Row] = ()) -> list[Candidate]:
        """Returns candidates with the modules in float32 that are to blame."""
        if each.judged == "undecided" or self._cannot_look():
            return []
        if race is not None:
            rows = [row for row in (*race.rows, *race.repeats) if row.mode == each.precision]
        troubles: dict[str, Trouble] = {"worse": "worse", "swallows": "swallowed"}
        trouble = troubles.get(each.judged, "not finite")
        known = {other.precision for other in self._choice.candidates}
        tried = propose(each.precision, trouble, self._layers, swallowed_by_module(rows))
        found = [Candidate(spelled(each.precision, exceptions), reasons=exceptions) for exceptions in tried]
        found = [candidate for candidate in found if candidate.precision not in known]
        if found:
            self._weigh_bytes(found)
        return [each for each in found if self._measured or (each.bytes is not None and self._fits(each))]

    def _cannot_look(self) -> bool:
        if not self._layers:
            try:
                self._layers = self._runs.look(self._choice.steps, self._seed)
            except (ChildFailed, TaskError) as failure:
                self._choice.untested.append(
                    f"exceptions: the float64 step that shows where they are needed: {failure}"
                )
                self._layers = [Layer("")]
        return len(self._layers) == 1

    def _untested(self) -> None:
        steps = self._choice.steps
        if self._unknown:
            self._choice.untested.append(
                f"the peak memory of {', '.join(self._unknown)}: `precision estimate` says why it cannot trace it"
            )
        self._choice.untested += [
            f"more than {steps} steps: what overflows or stalls later is not seen",
            "other devices, several processes, torch.compile",
        ]


def _is_tight(candidates: Sequence[Candidate]) -> bool:
    """Whether all of them at once take more than half of this machine's memory."""
    memory = describe_machine().memory_bytes
    return memory is not None and sum(each.bytes or 0 for each in candidates) > memory / 2


def _frozen(row: Row, base: Row) -> str:
    """Returns how much of the model trains, where the mode freezes some of it, to be added to a reason."""
    if row.trains is None or base.trains is None or row.trains >= base.trains:
        return ""
    return f"; it trains {percent(row.trains)} of the parameters, 32-true {percent(base.trains)}"


def _kept_bytes(row: Row) -> int:
    return sum(size or 0 for size in (row.parameter_bytes, row.gradient_bytes, row.optimizer_bytes))
