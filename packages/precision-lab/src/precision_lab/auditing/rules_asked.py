"""Rules about what the script asked its library for, and what ran."""

from __future__ import annotations

from collections.abc import Iterator

from precision_lab.auditing.finding import Finding, Remedy
from precision_lab.auditing.ledger import short
from precision_lab.auditing.observed import observed
from precision_lab.auditing.record import Record


def asked_and_not_done(record: Record) -> Iterator[Finding]:
    """A mode was asked for by name, and no product of the model ran in its dtype."""
    seen = observed(record).get("compute", [])
    for asked in record.asked:
        if not seen or asked.compute is None or short(asked.compute) in seen or "int8" in seen:
            continue
        device = " and ".join(record.devices)
        yield Finding(
            "asked-and-not-done",
            "error",
            f"{asked.text} was asked for, and all matrix products ran in {' and '.join(seen)}",
            f"{asked.library} does not run {short(asked.compute)} on {device}, and says nothing: figures of speed, "
            "memory and accuracy are those of another precision",
            Remedy(
                torch="ask for a precision that runs on this device",
                ours=f'Fabric(precision="...") runs what it is asked for on {device}, or raises; '
                "`precision doctor` lists what runs here",
                accelerate='mixed_precision="bf16" runs on a CPU; "fp16" needs an accelerator',
                lightning='precision="bf16-mixed" runs on a CPU',
                transformers="TrainingArguments(bf16=True) runs on a CPU; fp16=True needs an accelerator",
            ),
            line=asked.line,
        )


RULES = (asked_and_not_done,)
