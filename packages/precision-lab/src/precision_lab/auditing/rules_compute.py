"""Rules about what is computed in half that should not be, and in float64 that nobody asked for."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from precision_lab.auditing.finding import Finding, Remedy
from precision_lab.auditing.kinds import LOSS, PRODUCTS, SUM
from precision_lab.auditing.phrases import HALVES, dtypes, is_asked, listed, module_of
from precision_lab.auditing.record import FORWARD, LOOP, Op, Record
from precision_lab.auditing.where import Line

_WIDE = 500
"""Classes from which on a softmax in half is no longer exact enough for a loss."""
_MANY = 1 << 16
"""Elements from which on a loss that was added up in half is found."""


def _by_module(record: Record, *phases: str) -> dict[str, list[Op]]:
    """Returns module -> its operations from half to half that have a gradient."""
    found: dict[str, list[Op]] = {}
    for op in record.ops:
        if op.phase in phases and op.inputs and op.inputs[0] in HALVES and op.output in HALVES and op.grad:
            found.setdefault(op.module, []).append(op)
    return found


def norms_in_half(record: Record) -> Iterator[Finding]:
    """A norm that is written by hand: squares, their mean and its root in half, or a division by a norm in half."""
    every = [op for op in record.ops if op.by_hand == "norm" and op.grad]
    norms = [op for op in every if op.name == "linalg_vector_norm"]  # of x.norm() and F.normalize
    squares = [op for op in every if op not in norms]
    for found, why in ((squares, _SQUARES), (norms, _NORMS)):
        if not found:
            continue
        modules = list(dict.fromkeys(op.module for op in found))
        # On some devices autocast leaves x.norm() in half: it is torch that decides.
        by_torch = found is norms and all(op.autocast for op in found)
        yield Finding(
            "half-norm",
            "info" if is_asked(record) or by_torch else "warning",
            f"a norm is computed in {dtypes(op.inputs[0] for op in found)}, by {found[0].name} and what stands "
            f"beside it, in {len(modules)} modules ({listed(modules)})",
            why,
            Remedy(
                torch="compute the norm in float32: x = x.float() before it, as in F.normalize(x.float(), dim=-1), and "
                ".to(dtype) after it; or torch.nn.RMSNorm, LayerNorm, which compute in float32 inside",
                ours='the same, or Fabric(precision="bf16-true; *norm*: 32-true"), which keeps modules of that name '
                "in float32",
            ),
            line=found[0].line,
            module=modules[0],
        )


_SQUARES = (
    "squares lose half of their digits in 8 bits of precision (bfloat16), and overflow above 255 in float16; the "
    "error is the same for the whole row, so it does not average out"
)
_NORMS = (
    "the norm is rounded to 8 bits of precision (bfloat16), and then divides the whole row: the error does not average "
    "out, and lengths are 1 but for 1/256; in float16 a small norm is zero"
)


def softmax_by_hand(record: Record) -> Iterator[Finding]:
    """exp and sum in half, instead of a softmax that adds up in float32."""
    for exp in [op for op in record.ops if op.by_hand == "softmax" and op.grad][:3]:
        yield Finding(
            "half-softmax",
            "info" if is_asked(record) else "warning",
            f"a softmax is computed by hand in {dtypes([exp.inputs[0]])}: exp, and a sum of it",
            "each exponential and their sum are rounded to 8 bits of precision (bfloat16), and exp overflows "
            "above 11 in "
            "float16; torch.softmax computes in float32 inside and rounds once",
            Remedy(
                torch="torch.softmax(scores, dim=-1), F.log_softmax, or torch.softmax(scores, -1, dtype=torch.float32)",
                ours="the same: it is the loop's own code",
            ),
            line=exp.line,
            module=exp.module,
        )


def loss_in_half(record: Record) -> Iterator[Finding]:
    """A loss over many classes, or many elements, in half."""
    found: list[tuple[Op, str]] = []
    for ops in _by_module(record, FORWARD, LOOP).values():
        has_log = any(op.name in ("log", "logsumexp") for op in ops)
        for op in ops:
            if op.width >= _WIDE and (op.name in ("_log_softmax", "logsumexp") or (op.name == "_softmax" and has_log)):
                found.append((op, f"over {op.width:,} classes"))
            elif op.kind in (SUM, LOSS) and op.width >= _MANY and op.elements == op.count:
                found.append((op, f"of {op.width:,} elements"))
    for op, of in found[:3]:
        yield Finding(
            "half-loss",
            "info" if is_asked(record) else "warning",
            f"{op.name.strip('_')} {of} is computed in {dtypes([op.inputs[0]])}",
            "log-probabilities near -10 are spaced by 1/16 in bfloat16, so the gradient of a class is off by up to "
            "3 %; a sum is rounded to 8 bits, and above 65,504 it is inf in float16",
            Remedy(
                torch="compute the loss in float32: F.cross_entropy(logits.float(), targets); under "
                "torch.autocast it is",
                ours='Fabric(precision="bf16-true") returns float32 from forward: compute the loss outside of '
                "the model",
                lightning="compute the loss outside of the module's forward, whose output Fabric returns in float32",
            ),
            line=op.line,
            module=op.module,
        )


def float64_leaks(record: Record) -> Iterator[Finding]:
    """float64 results, or parameters, in a model that is not float64."""
    trained = [each for each in record.stored if each.kind == "params"]
    wide = [each for each in trained if each.dtype is torch.float64]
    if 2 * sum(each.elements for each in wide) >= sum(each.elements for each in trained):
        return
    remedy = Remedy(
        torch="make it float32 where it enters: torch.from_numpy(array).float(), torch.tensor(array, "
        "dtype=torch.float32)",
        ours='the same; Fabric(precision="32-true") converts parameters and inputs, not what a loop makes beside them',
    )
    if wide:
        names = [each.name for each in wide]
        yield Finding(
            "float64-leak",
            "warning",
            f"{len(wide)} of {len(trained)} parameters are float64: {listed(names)}",
            "NumPy's arrays are float64: a parameter made of one is, with its gradient and state, and promotes what it "
            "meets. float64 is 2 to 64 times slower on a GPU",
            remedy,
            module=module_of(names),
            line=_first_line(record, names),
        )
    narrow = (torch.float32, *HALVES)
    mixed = [op for op in record.ops if op.phase in (FORWARD, LOOP) and op.output is torch.float64 and op.grad]
    mixed = [op for op in mixed if torch.float64 in op.inputs and any(each in narrow for each in op.inputs)]
    once = {(op.module, op.line): op for op in reversed(mixed)}
    for op in list(reversed(once.values()))[:3]:
        many = op.elements > op.count
        yield Finding(
            "float64-leak",
            "warning" if many else "info",
            f"a float64 operand makes the result of {op.name} float64 ({op.elements // op.count:,} elements)",
            "torch promotes float32 with float64, NumPy's default, to float64: what follows, up to the loss and its "
            "gradient, is computed in it, 2 to 64 times slower on a GPU",
            remedy,
            line=op.line,
            module=op.module,
        )
    yield from _float64_on_purpose(record, remedy, found=bool(wide or mixed))


def _float64_on_purpose(record: Record, remedy: Remedy, found: bool) -> Iterator[Finding]:
    """Products of operands that were cast to float64, and a loss that was."""
    products = [op for op in record.ops if op.kind in PRODUCTS and op.phase == FORWARD and op.inputs and op.grad]
    every = sum(op.bytes for op in products)
    places: dict[tuple[str, object], list[Op]] = {}
    for op in products:
        if op.inputs[-1] is torch.float64 and not found:
            places.setdefault((op.module, op.line), []).append(op)
    for ops in list(places.values())[:3]:
        share = sum(op.bytes for op in ops) / every
        yield Finding(
            "float64-leak",
            "warning" if share >= 0.05 and not ops[0].via else "info",
            f"{ops[0].name} is computed in float64, {share:.0%} of the results of all forward products",
            "its operands were cast to float64, while the parameters are not: 2 to 64 times slower on a GPU",
            remedy,
            line=ops[0].line,
            module=ops[0].module,
        )
    losses = [event for event in record.of("backward") if event.dtype is torch.float64]
    if losses and not found and not places:
        yield Finding(
            "float64-leak",
            "info",
            "the loss is float64",
            "its gradient is computed in float64 up to where it was cast, 2 to 64 times slower on a GPU",
            remedy,
            line=losses[0].line,
        )


def _first_line(record: Record, names: list[str]) -> Line | None:
    modules = {name.rpartition(".")[0] for name in names}
    ops = [op for op in record.ops if op.phase == FORWARD and op.module in modules and torch.float64 in op.inputs]
    return ops[0].line if ops else None


RULES = (norms_in_half, softmax_by_hand, loss_in_half, float64_leaks)
