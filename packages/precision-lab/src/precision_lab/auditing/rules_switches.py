"""Rules about torch's switches for float32 products: TF32 on or off against what was asked."""

from __future__ import annotations

from collections.abc import Iterator

from precision_lab.auditing.finding import Finding, Remedy
from precision_lab.auditing.record import Event, Record


def switched(record: Record) -> Iterator[Finding]:
    """The switch was set to one thing, then to another, or after the model had run."""
    ran = False
    last: Event | None = None
    for event in record.events:
        ran |= event.kind == "forward" and bool(event.params)
        if event.kind != "switches":
            continue
        against = last is not None and last.tf32 != event.tf32
        late = ran and (last is None or against)
        if against or late:
            first = f"; {last.line} had asked for {_said(last)}" if against and last is not None else ""
            yield Finding(
                "tf32-switched",
                "warning" if "cuda" in record.devices else "info",
                f"{_said(event)} was set {'after the model had run' if late else 'later'}{first}",
                "products of float32 are computed with 10 bits of mantissa (TF32) before and with 23 after it, or the "
                "other way round; which one counts depends on what runs when"
                + ("" if "cuda" in record.devices else " (on a GPU; on this device TF32 does not exist)"),
                Remedy(
                    torch='set torch.set_float32_matmul_precision("high") (TF32) or "highest" (float32) once, before '
                    "the "
                    "model is made",
                    ours='set torch.set_float32_matmul_precision("high") or "highest" once, before fabric.setup',
                ),
                line=event.line,
            )
        last = event


def _said(event: Event) -> str:
    return f"{event.name} = {event.value!r}"


RULES = (switched,)
