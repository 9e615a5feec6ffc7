"""Faults injected into a training step, and what `precision_lab.explain` says of each: a table.

    python benchmarks/bench_why.py            # twelve kinds, ten places, three models, four modes: minutes
    python benchmarks/bench_why.py --places 2 --verbose

Only faults that bite count: a loss or a gradient is not finite, or all gradients before a place are zero. Named to the
operation: line and operation (of a batch, a label, a parameter: its name). To the module: the place. Mended: the remedy
that is printed first was tried and the step was finite; of remedies that are exceptions, that a step of `Fabric` with
that precision=, and a loss scale that a scaler would come to, is finite, too ("finite by Fabric").
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from why_models import MLP, NARROW_END, PLACES, WIDE_END, Conv, Place, Transformer, batch_for

from precision_core import Fabric
from precision_lab.explaining.explain import explain
from precision_lab.explaining.explanation import Explanation

OPERATIONS = {  # of each fault: what counts as the operation's name
    "weight": {"addmm", "mm", "bmm", "linear", "_to_copy", "convolution", "matmul"},
    "logits": {"bmm", "mm", "matmul"},
    "masked_row": {"_softmax"},
    "squares": {"pow", "mul", "sum"},  # x / inf is 0: a place whose gradients are all zero
    "squash": {"pow", "mul", "sum"},
    "exp": {"exp"},
    "log": {"log"},
    "division": {"div"},
    "root": {"sqrt"},
    "backward_overflow": {"mul"},
    "underflow": {"mul"},
}
FAULTS = [*OPERATIONS, "batch", "label", "parameter"]
MODES = ("16-mixed", "bf16-mixed", "16-true", "32-true")
MODELS = {"MLP": MLP, "transformer": Transformer, "conv": Conv}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--places", type=int, default=PLACES)
    parser.add_argument("--verbose", action="store_true", help="print what was missed")
    options = parser.parse_args()
    began = time.process_time()
    counts: dict[str, Counter[str]] = {}
    for mode in MODES:
        for title in MODELS:
            for fault in FAULTS:
                for place in range(options.places):
                    seen = one(mode, title, fault, place, options.verbose)
                    for key in (fault, mode, title, "all"):
                        counts.setdefault(key, Counter()).update(seen)
    print("| fault, mode, model | bite | to the operation | to the module | mended | exceptions | finite by Fabric |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for key, count in sorted(counts.items(), key=lambda each: [*FAULTS, *MODES, *MODELS, "all"].index(each[0])):
        if bite := count["bite"]:
            named = " | ".join(f"{count[each]} ({count[each] / bite:.1%})" for each in ("op", "module", "mended"))
            print(f"| {key} | {bite} | {named} | {count['exceptions']} | {count['fabric']} |")
    wrong = [
        each
        for mode in MODES
        for title in MODELS
        for each in range(options.places)
        if right(mode, title, each).kind != "nothing"
    ]
    print(f"\n{len(wrong)} of {len(MODES) * len(MODELS) * options.places} right steps were said to be wrong")
    print(f"{counts['all']['seconds'] / max(counts['all']['bite'], 1):.0f} ms an explanation")
    print(f"{time.process_time() - began:.0f} CPU seconds in all")


def one(mode: str, title: str, fault: str, place: int, verbose: bool) -> dict[str, int]:
    """Injects a fault, trains one step, and counts what is said of it."""
    torch.manual_seed(place)
    model = MODELS[title]()
    batch, labels = batch_for(model), torch.randint(4, (8 if title == "MLP" else 4,))
    path, where = inject(model, fault, place, mode)
    if fault == "batch":
        batch.view(-1)[place * 7] = (torch.inf, -torch.inf, torch.nan)[place % 3]
    target = functional.one_hot(labels, 4).float()
    if fault == "label":
        target[place % len(target), 1] = torch.inf
    pristine = copy.deepcopy(model)
    model, context = prepared(model, mode)
    scale = 1024.0 if mode.startswith("16") and fault != "underflow" else 1.0
    if fault == "backward_overflow" and not mode.startswith("16"):
        scale = 1e4
    loss, _, kept = step(model, batch, target, context, scale)
    bites = trouble(model, loss, fault, path)
    if not bites:
        return {}
    began = time.perf_counter()
    finite_loss = bool(loss.isfinite())
    found = explain(
        model,
        (batch,),
        context=context,
        loss=None if finite_loss else step(model, batch, target, context, scale, backward=False)[0],
        output_gradients=kept if finite_loss else None,
    )
    seconds = round((time.perf_counter() - began) * 1000)
    named, to_module = judged(found, fault, path, where)
    remedy = found.remedy
    fabric = (
        remedy is not None
        and remedy.kind == "exception"
        and by_fabric(pristine, remedy.ours, mode, batch, target, scale)
    )
    is_exception = remedy is not None and remedy.kind == "exception"
    if verbose and (not named or not to_module or remedy is None or (is_exception and not fabric)):
        print(
            mode,
            title,
            fault,
            path,
            "->",
            found.operation,
            found.forward,
            found.module or found.name,
            found.line,
            "|",
            found.what,
        )
        print("    ", [(each.ours, each.outcome) for each in found.remedies], fabric)
    return {
        "bite": 1,
        "op": named,
        "module": to_module,
        "mended": remedy is not None,
        "exceptions": is_exception,
        "fabric": bool(fabric),
        "seconds": seconds,
    }


def right(mode: str, title: str, seed: int) -> Explanation:
    """Explains a step in which nothing is wrong."""
    torch.manual_seed(seed)
    model = MODELS[title]()
    batch = batch_for(model)
    target = torch.randn(len(batch), 4)
    model, context = prepared(model, mode)

    def loss(output: Any) -> Tensor:
        return functional.mse_loss((output["logits"] if isinstance(output, dict) else output).float(), target)

    return explain(model, (batch,), context=context, loss=loss, scale=1024.0)


def prepared(model: nn.Module, mode: str) -> tuple[nn.Module, Callable[[], AbstractContextManager[Any]]]:
    """Returns the model and the context of its forward in a mode: by Fabric for 16-true, else by torch alone."""
    if mode == "16-true":
        return Fabric(precision="16-true", accelerator="cpu").setup(model), nullcontext
    if mode == "32-true":
        return model, nullcontext
    dtype = torch.float16 if mode == "16-mixed" else torch.bfloat16
    return model, lambda: torch.autocast("cpu", dtype)


def inject(model: nn.Module, fault: str, number: int, mode: str) -> tuple[str, str]:
    """Switches a fault on at a place; returns the place's path and the mark of its line."""
    path, place = [(path, each) for path, each in model.named_modules() if isinstance(each, Place)][number]
    place.end = NARROW_END if mode.startswith("16") else WIDE_END
    with torch.no_grad():
        if fault == "weight":
            place.linear.weight.fill_(place.end).view(-1)[::3] *= -0.5
            return path, "x = self.linear(x)"
        if fault == "parameter":
            place.linear.weight[number % 8, 3] = torch.nan
        elif fault not in ("batch", "label"):
            place.fault = fault
            if fault == "logits" and number % 2:
                place.fault = "masked_row"
    return path, f"# {place.fault}"


def step(
    model: nn.Module, batch: Tensor, target: Tensor, context: Any, scale: float, backward: bool = True
) -> tuple[Tensor, Any, list[Tensor | None]]:
    """One forward and backward as a loop has it; returns the loss, the outputs, and the gradients that reached them."""
    for param in model.parameters():
        param.grad = None
    buffers = [each.clone() for each in model.buffers()]
    kept: list[Tensor | None] = [None]
    with context():
        output = model(batch)
        logits = output["logits"] if isinstance(output, dict) else output
        logits.register_hook(lambda gradient: kept.__setitem__(0, gradient.detach()))
        loss = functional.mse_loss(logits.float(), target)
    if backward:
        (loss * scale).backward()
    with torch.no_grad():
        for buffer, old in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(old)
    return loss, output, kept


def trouble(model: nn.Module, loss: Tensor, fault: str, path: str) -> bool:
    """Whether the fault bites."""
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    if fault in ("underflow", "squares"):
        own = gradients[f"{path}.linear.weight"]
        return bool((own == 0).all()) and all(bool(each.isfinite().all()) for each in gradients.values())
    return not bool(loss.isfinite()) or any(not bool(each.isfinite().all()) for each in gradients.values())


def judged(found: Explanation, fault: str, path: str, where: str) -> tuple[bool, bool]:
    """Whether the explanation names the operation, and the module."""
    if fault == "batch":
        return (found.kind == "bad data" and found.name == "input 0",) * 2
    if fault == "label":
        return (
            found.kind == "bad data" and found.name == "the labels" and found.operation in ("MseLoss", "mse_loss"),
        ) * 2
    in_place = found.module == path or found.module.startswith(f"{path}.")
    if fault == "parameter":
        return found.name == f"{path}.linear.weight", in_place
    kind = where.removeprefix("# ") if where.startswith("# ") else fault
    names = {found.operation.rstrip("_"), found.forward.rstrip("_")}
    line = found.line.text if found.line is not None else ""
    return bool(names & OPERATIONS[kind]) and where in line and in_place, in_place


def by_fabric(model: nn.Module, text: str, mode: str, batch: Tensor, target: Tensor, scale: float) -> bool:
    """Whether a step of Fabric with the remedy as its precision is finite."""
    precision = text.removeprefix('precision="').strip('"')
    if not text.startswith("precision="):
        precision = f"{mode}; {precision}"
    try:
        model = Fabric(precision=precision, accelerator="cpu").setup(model)
        for power in (0, 10, 20, 40):  # as a scaler, too, would come to
            loss, _, _ = step(model, batch, target, nullcontext, scale / 2**power)
            if not trouble(model, loss, "", ""):
                return True
    except Exception as error:
        print("    Fabric:", precision, type(error).__name__, error)
    return False


if __name__ == "__main__":
    main()
