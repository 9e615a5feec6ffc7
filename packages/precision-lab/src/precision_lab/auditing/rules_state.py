"""Rules about what half parameters bring with them: optimizer state, updates, accumulated and reduced gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from precision_lab.auditing.finding import Finding, Remedy
from precision_lab.auditing.phrases import HALVES, cast_line, dtypes, is_asked, listed, module_of, size
from precision_lab.auditing.record import BACKWARD, LOOP, STEP, Event, Record, Stored
from precision_lab.auditing.where import Line

_MASTER = 'Fabric(precision="bf16-master"): bfloat16 weights with a float32 master, state and gradients in float32'
_FULL = Remedy(
    torch="keep the parameters float32 (model.float(), or from_pretrained(..., dtype=torch.float32)) and run the "
    'forward under torch.autocast("cuda", torch.bfloat16)',
    ours=_MASTER,
    lightning='Fabric(precision="bf16-mixed") keeps parameters and state in float32',
    accelerate='load the model in float32 and let Accelerator(mixed_precision="bf16") cast what is computed',
    transformers="from_pretrained(..., dtype=torch.float32) with TrainingArguments(bf16=True)",
    deepspeed='hand a float32 model to deepspeed.initialize, with "bf16": {"enabled": true} in the config: the engine '
    "keeps float32 master weights and state",
)


def _half_state(record: Record) -> list[Stored]:
    masters = {each.name for each in record.stored if each.kind == "master"}
    return [
        each for each in record.stored if each.kind == "state" and each.dtype in HALVES and each.name not in masters
    ]


def half_optimizer_state(record: Record) -> Iterator[Finding]:
    """Moments in half, because the optimizer makes its state like the parameters."""
    every_half = _half_state(record)
    params = {each.name: each.dtype for each in record.stored if each.kind in ("params", "master")}
    found = [each for each in every_half if params.get(each.name, each.dtype) in HALVES]
    yield from _half_beside_float32(record, [each for each in every_half if each not in found])
    if not found:
        return
    names = list(dict.fromkeys(each.name for each in found))
    every = {each.name for each in record.stored if each.kind == "params"}
    keys, kind = listed(dict.fromkeys(each.key for each in found)), dtypes(each.dtype for each in found)
    of = f"all {len(names)} parameters" if len(names) >= len(every) else f"{len(names)} of {len(every)} parameters"
    optimizers = listed(dict.fromkeys(event.name for event in record.of("step")))
    yield Finding(
        "half-optimizer-state",
        "info" if is_asked(record) else "warning",
        f"{optimizers} keeps {keys} in {kind} for {of} ({listed(names)}), {size(sum(each.bytes for each in found))}",
        "torch's optimizers make their state in the parameters' dtype. With 8 bits of precision (bfloat16) an average "
        "over more than about 100 steps stops moving: a change below 1/256 of a value is rounded away",
        _FULL,
        line=cast_line(record, {each.dtype for each in found}),
        module=module_of(names) if len(names) < len(every) else "",
    )


def _half_beside_float32(record: Record, found: list[Stored]) -> Iterator[Finding]:
    """State that an optimizer of the user's own makes in half, or that a loop cast."""
    if not found:
        return
    names = list(dict.fromkeys(each.name for each in found))
    lines = [
        record.cast_lines[f"{each.name}.{each.key}"] for each in found if f"{each.name}.{each.key}" in record.cast_lines
    ]
    steps = record.of("step")
    yield Finding(
        "half-optimizer-state",
        "info" if is_asked(record) else "warning",
        f"{listed(dict.fromkeys(each.key for each in found))} is kept in {dtypes(each.dtype for each in found)} for "
        f"{len(names)} parameters that are float32 ({listed(names)})",
        "with 8 bits of precision (bfloat16) an average over more than about 100 steps stops moving: a change below "
        "1/256 of a value is rounded away; the float32 parameters then follow a stale average",
        Remedy(
            torch="make the state like the parameter, torch.zeros_like(param), and leave its dtype as it is",
            ours="the same; optimizers that fabric.setup returns keep their state in float32",
        ),
        line=lines[0] if lines else steps[0].line if steps else None,
        module=module_of(names),
    )


def float16_state(record: Record) -> Iterator[Finding]:
    """Adam's second moment in float16: squares of small gradients are zero, and so is its epsilon."""
    found = [
        each
        for each in _half_state(record)
        if each.dtype is torch.float16 and each.key in ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
    ]
    total = sum(each.elements for each in found)
    zeros = sum(each.zeros * each.elements for each in found)
    broken = [each.name for each in found if not each.finite]
    if not broken and (not total or zeros / total < 0.02):
        return
    worst = max(found, key=lambda each: (not each.finite, each.zeros))
    said = f"; {listed(broken)} has inf or NaN already" if broken else ""
    yield Finding(
        "float16-state",
        "info" if is_asked(record) and not broken else "error",
        f"{zeros / total:.0%} of {worst.key} in float16 are zero ({worst.name}: {worst.zeros:.0%}){said}",
        "the square of a gradient below 0.0002 is zero in float16, and so is Adam's eps=1e-8: the update divides by "
        "zero and the weights become inf or NaN",
        Remedy(
            torch='keep the parameters float32 under torch.autocast("cuda", torch.float16) with '
            "torch.amp.GradScaler(); or, as a stopgap, AdamW(..., eps=1e-5)",
            ours='Fabric(precision="16-master"): float16 weights with a float32 master, state in float32',
            lightning='Fabric(precision="16-mixed"), or eps=1e-5',
            accelerate='load the model in float32, with Accelerator(mixed_precision="fp16")',
            transformers="from_pretrained(..., dtype=torch.float32) with TrainingArguments(fp16=True)",
        ),
        line=cast_line(record, [torch.float16]),
        module=worst.name.rpartition(".")[0],
    )


def _rounds_stochastically(record: Record) -> bool:
    draws = ("random", "rand", "bernoulli", "uniform", "bitwise_", "__rshift__")  # the last: by the float's own bits
    return any(op.phase == STEP and op.name.startswith(draws) for op in record.ops)


def updates_round_to_nothing(record: Record) -> Iterator[Finding]:
    """Of the sampled elements of half parameters many stayed as they were, although they had a gradient."""
    exact = {each.name for each in record.stored if each.kind == "master"}
    exact |= {each.name for each in record.stored if each.kind == "state" and _compensates(each.key)}
    found = [each for each in record.updates if each.name not in exact and each.dtype in HALVES and each.seen]
    if not found or _rounds_stochastically(record):
        return
    elements = {each.name: each.elements for each in record.stored if each.kind == "params"}
    total = sum(elements.get(each.name, each.seen) for each in found)
    lost = sum(elements.get(each.name, each.seen) * each.unchanged / each.seen for each in found)
    if lost / total <= 0.2:
        return
    worst = sorted(found, key=lambda each: -each.unchanged / each.seen)
    shares = ", ".join(f"{each.name} {each.unchanged / each.seen:.0%}" for each in worst[:3])
    steps = record.of("step") or record.of("hand_step")
    yield Finding(
        "updates-round-to-nothing",
        "info" if is_asked(record) else "warning",
        f"{lost / total:.0%} of the updates changed nothing: most in {shares}",
        f"an update below half the spacing of a {dtypes(each.dtype for each in found)} weight (1/512 of it in "
        "bfloat16) is rounded away, however often it comes: training stalls without an error",
        _FULL,
        line=steps[0].line if steps else None,
        module=worst[0].name.rpartition(".")[0],
    )


def _compensates(key: str) -> bool:
    return any(word in key.lower() for word in ("comp", "kahan", "residual", "shift"))


_ACCUMULATE = Remedy(
    torch='keep the parameters, and so their gradients, float32 under torch.autocast("cuda", torch.bfloat16); sum '
    "gradients in float32 tensors",
    ours='Fabric(precision="bf16-mixed"), or "bf16-master": gradients are accumulated in float32',
    lightning='Fabric(precision="bf16-mixed") accumulates in float32',
    deepspeed='"data_types": {"grad_accum_dtype": "fp32"} in the config of the engine',
    accelerate='load the model in float32, with Accelerator(mixed_precision="bf16")',
    transformers="from_pretrained(..., dtype=torch.float32) with TrainingArguments(bf16=True)",
)


def half_accumulation(record: Record) -> Iterator[Finding]:
    """Gradients of several micro-batches are added up in half."""
    half = {each.name: each for each in record.stored if each.kind == "grads" and each.dtype in HALVES}
    counts = {name: record.micro_batches.get(name, 1) for name in half}
    names = [name for name, count in counts.items() if count > 1]
    backward = record.of("backward")
    if names:
        kind = dtypes(half[name].dtype for name in names)
        line = backward[0].line if backward else None
        module = module_of(names) if len(names) < len(counts) else ""
        yield _accumulated(record, f"of {max(counts.values())} micro-batches are", kind, names, line, module)
    by_hand: dict[Line | None, list[Event]] = {}
    for event in record.of("added"):
        by_hand.setdefault(event.line, []).append(event)
    for line, events in by_hand.items():
        summed = list(dict.fromkeys(record.params.get(each, "") for event in events for each in event.ids))
        if not set(summed) <= set(names):
            yield _accumulated(
                record, "that the loop sums itself are", dtypes(each.dtype for each in events), summed, line, ""
            )


def _accumulated(record: Record, of: str, kind: str, names: list[str], line: Line | None, module: str) -> Finding:
    return Finding(
        "half-accumulation",
        "info" if is_asked(record) else "warning",
        f"gradients {of} added up in {kind} for {len(names)} parameters ({listed(names)})",
        "each addition rounds the sum to 8 bits of precision (bfloat16): what a micro-batch adds is lost as soon as "
        "it is below 1/512 of the sum, more with every micro-batch",
        _ACCUMULATE,
        line=line,
        module=module,
    )


def half_reduction(record: Record) -> Iterator[Finding]:
    """Gradients are added up over ranks in half."""
    events = [event for event in record.of("reduce") if event.dtype in HALVES and event.elements > 1]
    events = [event for event in events if event.phase in (BACKWARD, LOOP)]
    if not events:
        return
    hooks = record.of("comm_hook")
    params = {each.dtype for each in record.stored if each.kind == "params"}
    compressed = torch.float32 in params and not params & set(HALVES)
    how = "although the parameters are float32" if compressed else "as the parameters are half"
    if hooks and compressed:
        how += f", by {listed(event.name for event in hooks)}"
    yield Finding(
        "half-reduction",
        "info" if is_asked(record) else "warning",
        f"gradients are reduced over ranks in {dtypes(event.dtype for event in events)} "
        f"({len(events)} calls of {listed(dict.fromkeys(event.op for event in events))}), {how}",
        "a sum over N ranks is rounded at each of its additions: the more ranks, the more of each rank's share is lost",
        Remedy(
            torch="FSDP2: MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32); DDP: float32 "
            "parameters under autocast, and no bf16_compress_hook or fp16_compress_hook",
            ours='Fabric(precision="bf16-mixed", strategy="ddp" or "fsdp") reduces in float32; a policy says it: '
            '"params=bfloat16,reduce=float32"',
            lightning='Fabric(precision="bf16-mixed") reduces in float32 under DDP',
            deepspeed='"communication_data_type": "fp32" in the config of the engine',
            accelerate='Accelerator(mixed_precision="bf16") over a float32 model, with DDPCommunicationHookType.NO',
        ),
        line=hooks[0].line if hooks and compressed else events[0].line,
    )


RULES = (half_optimizer_state, float16_state, updates_round_to_nothing, half_accumulation, half_reduction)
