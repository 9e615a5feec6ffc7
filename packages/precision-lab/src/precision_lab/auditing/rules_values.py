"""Rules about values that a half dtype cannot hold: tables of positions, running statistics, integers, complex."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from precision_lab.auditing.finding import Finding, Remedy
from precision_lab.auditing.phrases import HALVES, cast_line, dtypes, is_asked, listed, module_of
from precision_lab.auditing.record import BACKWARD, Record, Stored

_KEEPS = (
    'Fabric(precision="bf16-true") keeps running statistics, inv_freq and buffers registered with persistent=False in '
    'float32; "params=bfloat16,buffers=float32" keeps every buffer'
)

_SAID = {
    "frequencies": ("rotary frequencies", "the angle is position times frequency: at position 1,000 a frequency with 8 "
                    "bits is off by up to 2 radians, so far positions are told apart wrongly"),
    "positions": ("positions", "bfloat16 holds whole numbers up to 256, float16 up to 2,048: above them neighbours are "
                  "the same number"),
    "angles": ("sines and cosines of positions", "values near 1 are spaced by 1/256 in bfloat16, so slow "
    "frequencies no "
               "longer tell neighbouring positions apart"),
}  # fmt: skip


def rounded_tables(record: Record) -> Iterator[Finding]:
    """Buffers that hold positions, their frequencies or angles, in half, or rounded to half and cast back."""
    for kind, (what, why) in _SAID.items():
        found = [each for each in record.stored if each.kind == "buffers" and each.holds == kind]
        if not found:
            continue
        names = [each.name for each in found]
        yield Finding(
            "rounded-positions",
            "info" if is_asked(record) else "warning",
            f"{what} are {_how(found)}: {listed(names)}",
            why,
            Remedy(
                torch="compute the table in float32 after the cast, or keep it: model.bfloat16(), then "
                "module.register_buffer(name, table.float()) with a table that was never rounded",
                ours=_KEEPS,
                transformers="load with from_pretrained(..., dtype=torch.bfloat16), which keeps inv_freq in float32, "
                "instead of model.bfloat16()",
            ),
            line=cast_line(record),
            module=names[0].rpartition(".")[0] if len(names) == 1 else module_of(names),
        )
    for angle in record.angles:
        yield Finding(
            "rounded-positions",
            "info" if is_asked(record) and angle.largest < 256 else "warning",
            f"{angle.kind} of angles up to {angle.largest:,.0f} is computed of {dtypes([angle.of])} numbers",
            "an angle with 8 bits of precision is off by up to 1/512 of itself, a whole turn at 3,000: "
            "positions are told "
            "apart wrongly",
            Remedy(
                torch="compute positions, frequencies and their product in float32, under "
                "torch.autocast(device_type, enabled=False), and cast cos and sin",
                ours='the same; Fabric(precision="bf16-mixed") is torch.autocast in the model, too',
            ),
            line=angle.line,
            module=angle.module,
        )


def _how(found: list[Stored]) -> str:
    half = {each.dtype for each in found} & set(HALVES)
    return f"stored in {dtypes(half)}" if half else "float32, but were rounded to half before"


def half_statistics(record: Record) -> Iterator[Finding]:
    """Running mean and variance of a batch norm in half."""
    found = [each for each in record.stored if each.kind == "buffers" and each.holds == "statistics"]
    if not found:
        return
    names = [each.name for each in found]
    yield Finding(
        "half-statistics",
        "info" if is_asked(record) else "warning",
        f"running statistics are kept in {dtypes(each.dtype for each in found)}: {listed(names)}",
        "each step moves them by a tenth of the difference, or less: below 1/512 of the value that is rounded away, so "
        "evaluation normalises with statistics that stopped moving",
        Remedy(
            torch="keep batch norms in float32 after the cast: module.float() for each "
            "torch.nn.modules.batchnorm._BatchNorm",
            ours=_KEEPS,
        ),
        line=cast_line(record, {each.dtype for each in found}),
        module=names[0].rpartition(".")[0],
    )


def rounded_integers(record: Record) -> Iterator[Finding]:
    """Whole numbers, such as ids, positions and times, that a half dtype rounds to others."""
    for event in record.integers:
        kind = dtypes([event.to])
        exact = 256 if event.to is torch.bfloat16 else 2048
        source = "whole numbers" if event.of.is_floating_point else "integers"
        yield Finding(
            "rounded-integers",
            "warning",
            f"{source} up to {event.largest:,.0f} become {kind}, which holds every whole number up to {exact:,} only",
            "ids, positions and times above that become their neighbours'; from 512 on every second is missing in "
            "bfloat16, from 65,536 on 511 of 512",
            Remedy(
                torch="leave them as integers, or float32, up to where they become features: torch.arange(n) without a "
                "half dtype, embedding(ids), sin(t.float())",
                ours='Fabric(precision="bf16-mixed") hands inputs over as they are; under bf16-true pass ids '
                "and times as "
                "integers, which are never cast",
                lightning="pass ids and times as integers: bf16-true casts floating tensors only",
            ),
            line=event.line,
            module=event.module,
        )


def complex_dropped(record: Record) -> Iterator[Finding]:
    """A complex tensor was cast to a real dtype: its imaginary part is gone."""
    for op in record.ops:
        if op.phase == BACKWARD or op.name not in ("_to_copy", "copy_") or len(op.inputs) < 1:
            continue
        target, source = (op.output, op.inputs[0]) if op.name == "_to_copy" else (op.inputs[0], op.inputs[-1])
        if target is None or target.is_complex or not source.is_complex:
            continue
        casts = [event for event in record.of("module_cast") if event.line == op.line]
        by = "a model's complex parameters or buffers are" if casts else "a complex tensor is"
        yield Finding(
            "complex-dropped",
            "error",
            f"{by} cast from {dtypes([source])} to {dtypes([target])}: the imaginary part is dropped",
            "torch keeps the real part and warns once; phases, as those of rotary tables and Fourier layers, are lost",
            Remedy(
                torch="cast floating tensors only (model.bfloat16() leaves complex ones, model.to(torch.bfloat16) does "
                "not), or keep both parts: torch.view_as_real(z)",
                ours='Fabric(precision="bf16-true") leaves complex parameters and buffers as they are',
            ),
            line=op.line,
            module=op.module,
        )


RULES = (rounded_tables, half_statistics, rounded_integers, complex_dropped)
