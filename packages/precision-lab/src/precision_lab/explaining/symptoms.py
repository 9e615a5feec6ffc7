"""What a file of `precision watch` tells of a run that went wrong, and what to type to know more."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from precision_lab.explaining.explanation import Explanation
from precision_lab.explaining.files import Run, all_of, is_alarm
from precision_lab.explaining.numbers import end_of, percent
from precision_lab.explaining.ranks import First, first_rank, order_of
from precision_lab.shown import Printed

_NEAR = 16.0
"""A module whose largest value is within this factor of its format's end is named."""
_GREW = 10.0
_NAMED = 5
_SKIPS = 10
_FEWEST, _LESS = 20, 0.01
"""Steps in a third of them, and how much lower its loss must be for it to go down."""


@dataclass
class Symptoms(Printed):
    """Of one run: its alarms, explained where the run could, and what else speaks for a cause."""

    path: str
    steps: int = 0
    alarms: list[dict[str, Any]] = field(default_factory=list)
    explanations: list[Explanation] = field(default_factory=list)
    signs: list[str] = field(default_factory=list)
    type: list[str] = field(default_factory=list)  # what to type
    findings: list[dict[str, Any]] = field(default_factory=list)  # swallowed updates
    ranks: int = 1
    first: First | None = None  # of several ranks

    def as_dict(self) -> dict[str, Any]:
        """Returns everything as plain values."""
        return {
            "version": 1,
            "path": self.path,
            "steps": self.steps,
            "ranks": self.ranks,
            "first": self.first.as_dict() if self.first is not None else None,
            "alarms": [{key: value for key, value in each.items() if key != "explanation"} for each in self.alarms],
            "explanations": [each.as_dict() for each in self.explanations],
            "findings": self.findings,
            "signs": self.signs,
            "type": self.type,
        }

    def __rich__(self) -> Any:
        from precision_lab.explaining.shown import shown_symptoms

        return shown_symptoms(self)


def symptoms(*paths: str) -> Symptoms:
    """Returns what files tell: those of several ranks, or one, beside which the others are found. Raises as `read`."""
    runs = all_of(paths)
    main = runs[0]
    lines = main.lines
    steps = [each for each in lines if "step" in each and not is_alarm(each)]
    found = Symptoms(main.path, len(steps), ranks=max(run.ranks for run in runs))
    found.first = first_rank({run.rank: run.alarms for run in runs}, found.ranks)
    found.alarms = [_with_rank(each, run) for run in runs for each in run.alarms]
    found.alarms.sort(key=lambda each: (order_of(each), each.get("rank", 0)))
    found.explanations = [
        Explanation.from_dict(each["explanation"]) for each in found.alarms if each.get("explanation")
    ]
    first = int(found.alarms[0].get("step", 0)) if found.alarms else _first_broken(steps)
    until = [each for each in lines if "sample" in each and isinstance(each.get("modules"), dict)]
    until = [each for each in until if first is None or _number(each) <= first]
    found.findings = [each for run in runs for each in run.lines if "finding" in each]
    found.signs = [*_of_steps(steps, first), *_of_samples(until)]
    if found.findings and (sign := _stalled(steps)):
        found.signs.append(sign)
    if first is not None and not found.explanations:
        found.type = [
            "# in the loop, before optimizer.step(), at the step in question:",
            f"if step == {first}:",
            "    found = precision_lab.explain(model, (batch,), loss=lambda output: criterion(output, labels))",
            "    rich.print(found)",
        ]
        reasons = {str(each["unexplained"]) for each in found.alarms if each.get("unexplained")}
        found.signs += [f"not replayed: {each}" for each in sorted(reasons)]
    return found


def _with_rank(alarm: dict[str, Any], run: Run) -> dict[str, Any]:
    return {**alarm, "rank": run.rank} if run.ranks > 1 else alarm


def _number(line: dict[str, Any]) -> float:
    value = line.get("sample", line.get("step", 0))
    return float(value) if isinstance(value, (int, float, str)) else 0.0


def _value(line: dict[str, Any], key: str) -> float | None:
    value = line.get(key)
    return float(value) if isinstance(value, (int, float, str)) else None


def _first_broken(steps: list[dict[str, Any]]) -> int | None:
    """Returns the first step whose loss or norm is not finite (and no scaler skipped it), None without."""
    for each in steps:
        values = [_value(each, key) for key in ("loss", "norm")]
        if not each.get("skipped") and any(value is not None and not math.isfinite(value) for value in values):
            return int(each["step"])
    return None


def _of_steps(steps: list[dict[str, Any]], first: int | None) -> list[str]:
    found: list[str] = []
    before = [each for each in steps if first is None or each["step"] < first]
    skipped = [each for each in steps if each.get("skipped")]
    if skipped:
        row = longest = 0
        for each in steps:
            row = row + 1 if each.get("skipped") else 0
            longest = max(longest, row)
        text = f"{len(skipped)} of {len(steps)} steps were skipped, {longest} in a row at most"
        scales = [value for each in steps if (value := _value(each, "scale")) is not None]
        if scales:
            text += f"; the loss scale went from {scales[0]:g} to {scales[-1]:g}"
        if longest >= _SKIPS:
            text += ": no scale fits, so it is not the scale: something is inf or NaN in the forward, or in the weights"
        found.append(f"{text}.")
    losses = [value for each in before[-50:] if (value := _value(each, "loss")) is not None and math.isfinite(value)]
    if losses and first is not None:
        at = next((_value(each, "loss") for each in steps if each["step"] == first), None)
        at_text = f", {at:.4g} in it" if at is not None else ""
        found.append(f"the loss was {min(losses):.4g} to {max(losses):.4g} in the steps before{at_text}.")
    norms = [value for each in before[-50:] if (value := _value(each, "norm")) is not None and math.isfinite(value)]
    if len(norms) > 1 and norms[-1] > _GREW * sorted(norms)[len(norms) // 2]:
        found.append(
            f"the norm of the gradients had grown to {norms[-1]:.3g}, from {sorted(norms)[len(norms) // 2]:.3g}."
        )
    return found


def _stalled(steps: list[dict[str, Any]]) -> str:
    """Returns a sentence where the loss of the last third of the steps is not below that of the third before."""
    losses = [value for each in steps if (value := _value(each, "loss")) is not None and math.isfinite(value)]
    third = len(losses) // 3
    if third < _FEWEST:
        return ""
    before, last = (median(losses[at * third : (at + 1) * third]) for at in (1, 2))
    if last < before - _LESS * abs(before):
        return ""
    return (
        f"the loss no longer goes down: its median is {before:.4g} in the second third of the steps, then {last:.4g}."
    )


def _of_samples(samples: list[dict[str, Any]]) -> list[str]:
    """Says which modules were near their format's end in the last sample, grew most, or sent zeros as gradients."""
    if not samples:
        return []
    last, early = samples[-1], samples[0]
    number = f"{_number(last):.0f}"
    near: list[tuple[float, str]] = []
    zeros: list[tuple[float, str]] = []
    grew: list[tuple[float, str]] = []
    for name, kinds in last["modules"].items():
        for kind, seen in kinds.items():
            what = f"{name or 'the model'}'s {'output' if kind == 'output' else 'gradient'}"
            amax, end = _value(seen, "amax"), end_of(str(seen.get("dtype", "")))
            if amax is not None and amax * _NEAR >= end and end < 1e30:
                near.append(
                    (amax / end, f"{what} reached {amax:.4g} in step {number}: {seen['dtype']} ends at {end:.4g}.")
                )
            zero = float(seen.get("zero", 0)) + float(seen.get("subnormal", 0))
            if kind == "gradient" and zero > 0.5:
                zeros.append((zero, f"{percent(zero)} of {what} is zero or subnormal in step {number}."))
            was = _value(early["modules"].get(name, {}).get(kind, {}), "amax")
            if amax is not None and was and amax > _GREW * was and len(samples) > 1:
                grew.append((amax / was, f"{what} grew from {was:.3g} to {amax:.3g} by step {number}."))
    found = [text for _, text in sorted(near, reverse=True)[:_NAMED]]
    found += [text for _, text in sorted(zeros, reverse=True)[:_NAMED]]
    return found + [text for _, text in sorted(grew, reverse=True)[:_NAMED]]
