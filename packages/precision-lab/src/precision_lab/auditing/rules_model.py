"""Rules about parts of a model: frozen ones that are cast each step, weights that should be one, quantised layers."""

from __future__ import annotations

from collections.abc import Iterator

from precision_lab.auditing.finding import Finding, Remedy
from precision_lab.auditing.kinds import CAST
from precision_lab.auditing.phrases import HALVES, listed, module_of, size
from precision_lab.auditing.record import BACKWARD, FORWARD, Op, Record


def frozen_recast(record: Record) -> Iterator[Finding]:
    """Frozen float32 parameters are cast by autocast in every forward: its cache holds only what trains."""
    found = [op for op in record.ops if op.kind == CAST and op.operand and op.output in HALVES and not op.grad]
    trained = {record.params.get(each) for event in record.of("backward") for each in event.ids}
    found = [op for op in found if op.autocast and op.operand not in trained]  # some are frozen for a part of a step
    if not found:
        return
    names = [op.operand for op in found]
    total, steps = sum(op.bytes for op in found), max(record.steps, 1)
    yield Finding(
        "frozen-recast",
        "info",
        f"{len(set(names))} frozen float32 parameters are cast to half in every forward ({listed(names)}), "
        f"{size(total / steps)} a step",
        "autocast keeps the cast weights of a step only of parameters that train; frozen ones are cast at each "
        "use, and "
        "take twice the memory",
        Remedy(
            torch="cast the frozen part once: encoder.bfloat16(), with batch norms left in float32",
            ours='Fabric(precision="bf16-mixed; encoder: bf16-true") stores the frozen part in bfloat16',
            lightning="encoder.bfloat16() before fabric.setup",
            trainer="self.encoder.bfloat16() in __init__ or configure_model",
            transformers="load the frozen base model with from_pretrained(..., dtype=torch.bfloat16)",
        ),
        line=found[0].line,
        module=module_of(list(dict.fromkeys(names))),
    )


def untied_weights(record: Record) -> Iterator[Finding]:
    """Two weights that were meant to be one train apart."""
    for one, other, by in record.untied:
        configured = by.startswith("config")
        seen = f"{by} is True" if configured else "they are equal before the first step"
        yield Finding(
            "untied-weights",
            "warning",
            f"{one} and {other} are two parameters, but {seen}",
            "a cast or a copy made two of one weight: each gets its own gradient, state and memory, and they "
            "drift apart. "
            + ("" if configured else "Assumed from their equal values: they may have been initialised so on purpose"),
            Remedy(
                torch="tie them after the cast or the load: head.weight = embedding.weight, then make the optimizer",
                ours="fabric.setup keeps tied weights tied: tie them before it",
                transformers="model.tie_weights() after the cast or the load, before the optimizer is made",
            ),
            module=other.rpartition(".")[0],
            sure="certain" if configured else "likely",
        )


def dequantised_layers(record: Record) -> Iterator[Finding]:
    """Quantised weights are dequantised in each forward and backward."""
    found = [op for op in record.ops if _dequantises(op)]
    if not found:
        return
    modules = list(dict.fromkeys(op.module for op in found if op.phase == FORWARD)) or [found[0].module]
    total, steps = sum(op.bytes for op in found), max(record.steps, 1)
    yield Finding(
        "dequantised-each-step",
        "info",
        f"the quantised weights of {len(modules)} layers ({listed(modules)}) are dequantised "
        f"{sum(op.count for op in found) // steps} times a step, {size(total / steps)}",
        "they are stored small and computed with in half: each forward and backward writes the half weights anew. That "
        "is what quantised training costs; with large batches it is little",
        Remedy(
            torch="nothing, where memory is short; else load the layers in bfloat16, or train with larger "
            "micro-batches",
            ours='nothing, where memory is short; else Fabric(precision="bf16-mixed")',
        ),
        line=found[0].line,
        module=module_of([f"{name}.weight" for name in modules]) if len(modules) > 1 else modules[0],
    )


def _dequantises(op: Op) -> bool:
    """4 bits by bitsandbytes' own operation, 8 bits by a cast of the stored weight; not its optimizers' states."""
    if op.phase not in (FORWARD, BACKWARD):
        return False
    return ("dequantize" in op.name and "blockwise" not in op.name) or op.promoted == "quantised"


RULES = (frozen_recast, untied_weights, dequantised_layers)
