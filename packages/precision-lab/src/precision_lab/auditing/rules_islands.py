"""Rules about float32 islands: products and results in float32 where autocast, or half parameters, were to be used."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from precision_lab.auditing.finding import Finding, Remedy
from precision_lab.auditing.kinds import CAST, PRODUCTS
from precision_lab.auditing.phrases import HALVES, is_asked, size
from precision_lab.auditing.record import BACKWARD, FORWARD, Op, Record
from precision_lab.auditing.where import Line

Place = tuple[str, Line | None]
_MOST = 3
"""Places of one rule that are findings of their own; the rest is counted."""
_MATTERS = 0.05
"""Share of the bytes of all products, or of all results in half, above which an island is a warning."""


def _places(ops: list[Op], weight: Callable[[Op], int]) -> list[tuple[Place, int, list[Op]]]:
    """Returns modules and lines, those with most bytes first."""
    found: dict[Place, list[Op]] = {}
    for op in ops:
        found.setdefault((op.module, op.line), []).append(op)
    rows = [(place, sum(map(weight, here)), here) for place, here in found.items()]
    return sorted((row for row in rows if row[1]), key=lambda row: -row[1])


def _is_disabled(record: Record, module: str) -> bool:
    """Whether an autocast(enabled=False) was entered in the module, or around it."""
    return any(
        not event.enabled and (module == event.inside or module.startswith(f"{event.inside}.") or not event.inside)
        for event in record.of("autocast")
    )


def _is_adapter(record: Record) -> bool:
    """Whether all that is half is frozen: small float32 adapters beside it are meant to be so."""
    return not any(each.kind == "params" and each.dtype in HALVES for each in record.stored)


def float32_products(record: Record) -> Iterator[Finding]:
    """Products in float32 within autocast, or in a model most of whose products are half."""
    products = [op for op in record.ops if op.kind in PRODUCTS and op.inputs and op.phase in (FORWARD, BACKWARD)]
    forward = [op for op in products if op.phase == FORWARD and op.grad]
    # Of attention that has no kernel for its arguments torch itself computes the products in float32.
    attention = {(op.module, op.line) for op in record.ops if op.name == "_safe_softmax"}
    half = sum(op.bytes for op in forward if op.inputs[-1] in HALVES)
    wide = [op for op in products if set(op.inputs[-2:]) == {torch.float32} and (op.grad or op.phase == BACKWARD)]
    wide = [op for op in wide if (op.module, op.line) not in attention]
    every = sum(op.bytes for op in forward)
    islands = [op for op in wide if op.phase == FORWARD and (op.under or half > every / 2)]
    known = {op.module for op in islands}
    islands += [op for op in wide if op.phase == BACKWARD and op.under and op.module not in known]
    rows = _places(islands, lambda op: op.bytes)
    for (module, line), count, here in rows[:_MOST]:
        op = here[0]
        asked = bool(op.via) or is_asked(record) or (not op.under and _is_disabled(record, module))
        adapter = not op.under and _is_adapter(record)
        way = "in backward " * (op.phase == BACKWARD)
        more = f"; {len(rows) - _MOST} more places" if len(rows) > _MOST and here is rows[_MOST - 1][2] else ""
        within = "under autocast" if op.under else "in a model that is half elsewhere"
        yield Finding(
            "float32-island",
            "warning" if count >= _MATTERS * every and not asked and not adapter else "info",
            f"{sum(each.count for each in here)} products ({op.name}) run {way}in float32 {within}, {size(count)} of "
            f"results, {count / (every or 1):.0%} of those of all forward products{more}",
            _why(op),
            _product_remedy(op),
            line=line,
            module=module,
        )


def _why(op: Op) -> str:
    if op.phase == BACKWARD:
        return (
            "the forward ran under autocast, its backward in float32: a custom autograd.Function without "
            "custom_fwd and "
            "custom_bwd, or one that casts to float32, multiplies in float32 several times slower"
        )
    if op.under:
        return (
            f"autocast casts what it knows of: not {op.name} with out=, in place, or on this device. The product takes "
            "the float32 path, several times slower on hardware with bfloat16 units"
        )
    return (
        "the activations were cast to float32, or promoted to it, before this layer: its products, and what follows, "
        "take twice the memory and are several times slower on hardware with bfloat16 units"
    )


def _product_remedy(op: Op) -> Remedy:
    if op.phase == BACKWARD:
        return Remedy(
            torch='decorate forward with torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.bfloat16) '
            "and backward "
            'with torch.amp.custom_bwd(device_type="cuda")',
            ours='the same: Fabric(precision="bf16-mixed") runs the model under torch.autocast',
        )
    if op.under:
        return Remedy(
            torch="call torch.matmul or F.linear, which autocast casts, in its place",
            ours='the same, or Fabric(precision="bf16-true"), whose parameters are bfloat16',
        )
    return Remedy(
        torch="leave the activations in the model's dtype: drop the .float(), and cast the layer (layer.bfloat16())",
        ours='Fabric(precision="bf16-true; NAME: 32-true") keeps a layer in float32 where that is meant, and '
        "casts around it",
    )


def _spreads(op: Op) -> bool:
    """Whether what was cast to float32 is used in other modules, other than those that it is returned to."""
    others = op.after_modules - {op.module}
    return not op.meant and any(not op.module.startswith(f"{each}." if each else "") for each in others)


def promoted_by_constant(record: Record) -> Iterator[Finding]:
    """A float32 constant or buffer meets half activations: the result, and what follows, is float32."""
    total = sum(op.bytes for op in record.ops if op.phase == FORWARD and op.output in HALVES) or 1
    ops = [op for op in record.ops if op.promoted == "constant" or (op.promoted == "cast" and _spreads(op))]
    rows = _places(ops, lambda op: op.bytes + op.after_bytes)
    for (module, line), count, here in rows[:_MOST]:
        op = here[0]
        after = {name for each in here for name in each.after_modules} - {module}
        if count < 0.01 * total:
            continue
        by_user = not op.via and not is_asked(record) and not op.meant
        what = "constant" if op.autocast else "constant, input or parameter"
        by = f"a float32 {what} ({op.name}) makes" if op.promoted == "constant" else "a cast makes"
        spread = (
            f", in {len(after)} other module{'s' * (len(after) > 1)} too ({', '.join(sorted(after)[:3])})"
            if after
            else ""
        )
        yield Finding(
            "promoted-to-float32",
            "warning" if by_user and after and count >= _MATTERS * total else "info",
            f"{by} half activations float32: {size(count)} of results{spread}, beside {size(total)} in half",
            "torch promotes half times float32 to float32, so everything from here to the next product or cast takes "
            "twice the memory and bandwidth",
            Remedy(
                torch="make the constant in the activation's dtype: constant.to(x.dtype), or torch.tensor(..., "
                "dtype=x.dtype, device=x.device)"
                if op.promoted == "constant"
                else "drop the .float(), or cast back to the input's dtype before the next module: .to(x.dtype); in an "
                "autograd.Function say the dtype with torch.amp.custom_fwd(device_type, cast_inputs=torch.bfloat16)",
                ours='the same; Fabric(precision="bf16-true") casts registered buffers with the model, so register it',
            ),
            line=line,
            module=module,
        )


def cast_and_cast_back(record: Record) -> Iterator[Finding]:
    """Activations are cast to float32, and back before anything is computed."""
    total = sum(op.bytes for op in record.ops if op.phase == FORWARD and op.output in HALVES) or 1
    rows = _places([op for op in record.ops if op.kind == CAST and op.back], lambda op: op.back)
    for (module, line), count, here in rows[:_MOST]:
        op = here[0]
        by_user = not op.via and not is_asked(record)
        yield Finding(
            "float32-cast-undone",
            "warning" if by_user and count >= _MATTERS * total else "info",
            f"half activations are cast to float32 and back at once, {size(count)}",
            "autocast casts the float32 input of a layer to half again: the .float() costs two copies and makes "
            "nothing "
            "more exact, the layer computes in half",
            Remedy(
                torch="drop the .float(); for a layer in float32 wrap it: with torch.autocast(device_type, "
                "enabled=False): "
                "layer(x.float())",
                ours='drop it; Fabric(precision="bf16-mixed; NAME: 32-true") runs a layer in float32',
            ),
            line=line,
            module=module,
        )


RULES = (float32_products, promoted_by_constant, cast_and_cast_back)
