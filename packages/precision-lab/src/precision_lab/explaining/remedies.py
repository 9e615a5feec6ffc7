"""Tries what would mend a step: modules in float32, one operation with its operands mended, another loss scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from precision_lab.auditing.where import Line
from precision_lab.explaining.causes import cause_of
from precision_lab.explaining.explanation import Remedy
from precision_lab.explaining.mends import LABELS, MENDS
from precision_lab.explaining.numbers import is_finite
from precision_lab.explaining.replay import Outcome, Step, run
from precision_lab.explaining.trace import Origin
from precision_lab.explaining.watched import IN_LOSS, Modules, Watched, Went
from precision_lab.explaining.wide import Patch, Wide

_RUNS = 12
_MODULES = 4
"""With more exceptions it is the whole model."""
_FLOAT32 = torch.finfo(torch.float32).max
BATCHES = "leave such batches out: if not torch.isfinite(x).all(): continue"
WEIGHTS = (
    "load a checkpoint from before, and skip steps whose gradients are not finite: by a GradScaler, or by "
    "torch.nn.utils.clip_grad_norm_(..., error_if_nonfinite=True)"
)
Find = Callable[[Watched, Outcome], Origin | None]
"""Returns where a step that is not finite first goes wrong."""


@dataclass
class Fixes:
    """What is changed in a step, in order, and what a user types for it."""

    dtype: torch.dtype = torch.float32
    paths: list[str] = field(default_factory=list)
    patches: list[Patch] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)  # of patches and clean values
    replaced: dict[int, Tensor] = field(default_factory=dict)
    narrowed: set[Line] = field(default_factory=set)  # lines that name a half dtype
    needed: bool = False  # whether an exception does anything

    def add(self, step: Step, origin: Origin) -> Step | None:
        """Adds what mends the origin; returns the step to try, None where there is nothing to add."""
        if isinstance(origin, str):
            return self._add_clean(step, origin)
        remedy = cause_of(origin).remedy
        wide = origin.wide if origin.wide is not None and origin.wide.finite else None
        if wide is not None and origin.output.dtype in ("float16", "bfloat16") and wide.largest < _FLOAT32:
            return step if self._add_path(origin.module) else None
        if remedy in MENDS and self._add_patch(origin, remedy):
            return step
        if wide is None:
            return None
        if self.dtype == torch.float64:
            return step if self._add_path(origin.module) else None
        self.dtype, self.paths = torch.float64, [IN_LOSS if origin.module == IN_LOSS else ""]  # no mode mixes float64
        return step

    def _add_path(self, module: str) -> bool:
        if module == IN_LOSS and IN_LOSS not in self.paths:
            self.paths.append(IN_LOSS)
            return True
        if "" in self.paths:
            return False
        if any(module == each or module.startswith(f"{each}.") for each in self.paths):
            module = module.rpartition(".")[0]
        paths = [*self.paths, module]
        self.paths = [each for each in paths if not any(each != of and each.startswith(f"{of}.") for of in paths if of)]
        if len(self.paths) > _MODULES:
            self.paths = ["", *(each for each in self.paths if each == IN_LOSS)]
        return True

    def _add_patch(self, went: Went, remedy: str) -> bool:
        functions, text, mend = MENDS[remedy]
        if any(
            (each.functions, each.module, each.line) == (functions, went.module, went.line) for each in self.patches
        ):
            return False
        self.patches.append(Patch(functions, went.module, went.line, mend))
        if text not in self.texts:
            self.texts.append(text)
        return True

    def _add_clean(self, step: Step, name: str) -> Step | None:
        what = name.partition(" ")[0]
        if what == "input":
            self.texts.append(BATCHES)
            return replace(step, args=_clean(step.args), kwargs=_clean(step.kwargs))
        bad = {id(each): _clean(each) for each in step.model.parameters() if not is_finite(each)}
        if what != "parameter" or not bad or bad.keys() <= self.replaced.keys():
            return None
        self.texts.append(WEIGHTS)
        self.replaced.update(bad)
        return step

    def run(self, step: Step) -> tuple[Watched, Outcome]:
        """Runs the step with all of it."""
        modules = Modules(step.model)
        wide = Wide(modules, self.paths, self.dtype, bool(self.paths), self.patches, self.replaced)
        watched = Watched(modules)
        outcome = run(step, modules, watched, wide)
        self.narrowed |= wide.narrowed
        self.needed |= wide.needed
        return watched, outcome

    def remedy(self, outcome: str) -> Remedy:
        """Returns it as a remedy with this outcome."""
        mode = "32-true" if self.dtype == torch.float32 else "64-true"
        ours, plain = list(self.texts), list(self.texts)
        cast = "float()" if mode == "32-true" else "double()"
        wider = self.needed or not self.narrowed  # else a cast that is spelled out is all that was narrow
        modules = [each for each in self.paths if each != IN_LOSS and wider]
        if "" in modules:
            ours.insert(0, f'precision="{mode}"')
            plain.insert(0, f"no autocast, and model.{cast}")
        elif modules:
            ours.insert(0, f'"{"; ".join(f"{each}: {mode}" for each in modules)}"')
            under = "under torch.autocast(device_type, enabled=False), parameters and inputs in"
            plain.insert(0, f"call {' and '.join(modules)} {under} .{cast}")
        if self.narrowed:
            lines = ", ".join(map(str, sorted(self.narrowed, key=lambda each: (each.file, each.number))))
            ours.append(f"float{mode[:2]} in place of the cast in {lines}")
            plain.append(ours[-1])
        if IN_LOSS in self.paths:
            ours.append(f"the loss of output.{cast}, outside of autocast")
            plain.append(ours[-1])
        kind = "code" if self.patches else "weights" if self.replaced else "data"
        if LABELS in self.texts:
            kind = "data"
        elif not self.texts:
            kind = "code" if self.narrowed else "exception"
        return Remedy(kind, ", and ".join(ours), ", and ".join(plain), outcome)


def try_fixes(step: Step, origin: Origin, find: Find) -> Remedy | None:
    """Mends what goes wrong first, then what goes wrong next, until the step is finite; None: nothing is known."""
    fixes = Fixes()
    outcome = Outcome(error="not run")
    following: Origin | None = origin
    for _ in range(_RUNS):
        changed = fixes.add(step, following) if following is not None else None
        if changed is None:
            break
        step = changed
        watched, outcome = fixes.run(step)
        following = find(watched, outcome)
        if following is None:  # or what is left is meant to be infinite
            break
    if outcome.error == "not run":
        return None
    return fixes.remedy(outcome.error[:200] or ("finite" if following is None else "not finite"))


def try_paths(step: Step, paths: list[str]) -> tuple[Remedy, list[Tensor]]:
    """Tries modules in float32; returns the outputs, too."""
    fixes = Fixes(paths=paths)
    outcome = fixes.run(step)[1]
    return fixes.remedy(result(outcome)), outcome.outputs


def try_scale(step: Step) -> Remedy | None:
    """Tries gradients that are scaled less: by 2**4, 2**8, ... less."""
    for power in (4, 8, 12, 16):
        gradients = step.output_gradients
        if gradients is not None:
            gradients = [each if each is None else each / 2**power for each in gradients]
        smaller = replace(step, output_gradients=gradients, scale=step.scale / 2**power)
        if run(smaller, Modules(step.model)).finite:
            text = f"a loss scale that is {2**power} times smaller"
            plain = f"{text}: torch.amp.GradScaler(init_scale=...), which skips such steps and halves it by itself"
            return Remedy("scale", f"{text}: 16-mixed finds it by itself", plain, "finite")
    return None


def _clean(value: Any) -> Any:
    if isinstance(value, Tensor):
        if is_finite(value):
            return value
        return torch.nan_to_num(value.detach(), 0.0, 0.0, 0.0).requires_grad_(value.requires_grad)
    if type(value) in (list, tuple):
        return type(value)(_clean(each) for each in value)
    return {key: _clean(each) for key, each in value.items()} if isinstance(value, dict) else value


def result(outcome: Outcome) -> str:
    """Returns what came of a try."""
    if outcome.error:
        return outcome.error[:200]
    return "finite" if outcome.finite else "not finite"
