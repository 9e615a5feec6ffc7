"""Rules about checkpoints that the run wrote: what is missing in them, and what was rounded."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from precision_lab.auditing.finding import Finding, Remedy
from precision_lab.auditing.ledger import short
from precision_lab.auditing.record import Event, Record
from precision_lab.auditing.replay import ENGINES

_OURS = 'fabric.save("last.ckpt", {"model": model, "optimizer": optimizer}) saves the precision\'s state with it'


def scaler_not_saved(record: Record) -> Iterator[Finding]:
    """A checkpoint to go on from has the optimizer's state and not the scaler's."""
    scales = {event.scale for event in record.of("scale")}
    if not scales:
        return
    saved = [event for event in record.of("saved") if event.library not in ENGINES]
    for event in saved:
        beside = [each for each in saved if each.step == event.step]
        has = any(each.scaler or scales & set(each.numbers) for each in beside)
        if event.optimizer and not has:
            yield Finding(
                "scaler-not-saved",
                "info" if event.library == "Lightning" else "warning",  # its fabric.save leaves the scaler out
                f"{event.file} has the optimizer's state and not the scaler's",
                "whoever goes on from it begins with the scaler's first scale (65,536, or init_scale) and a growth "
                "count "
                "of 0: steps are skipped until the scale fits, and the run differs from one that was not interrupted",
                Remedy(
                    torch='add "scaler": scaler.state_dict() to the checkpoint, and scaler.load_state_dict(...) '
                    "where it "
                    "is loaded",
                    ours=_OURS,
                    lightning='make the scaler yourself, Fabric(plugins=MixedPrecision("16-mixed", device, '
                    "scaler=scaler)), and add scaler.state_dict() to what fabric.save gets: it has none",
                    trainer="leave checkpoints to ModelCheckpoint, or trainer.save_checkpoint(path): the scaler's "
                    "state is in them",
                    accelerate="accelerator.save_state(folder) saves the scaler, too",
                    deepspeed="engine.save_checkpoint(folder) saves the loss scale, too",
                    transformers="leave checkpoints to Trainer, which writes scaler.pt",
                ),
                line=event.line,
            )


def saved_in_another_dtype(record: Record) -> Iterator[Finding]:
    """Tensors were saved in a narrower dtype than they were trained in."""
    states = {
        (each.name, each.key): each.dtype for each in record.stored if each.kind in ("state", "master") and each.key
    }
    keys = {key: {dtype for (_, of), dtype in states.items() if of == key} for _, key in states}
    saved = record.of("saved")
    exact = {name for event in saved for name, (_, dtype) in _rounded(record, event).items() if dtype is None}
    for event in saved:
        rounded = {name: pair for name, pair in _rounded(record, event).items() if pair[1] is not None}
        if rounded:
            other = event.file.endswith(".safetensors") or event.file == "the checkpoint"  # weights alone, in memory
            export = not event.optimizer and (other or rounded.keys() <= exact)
            yield _finding(event, rounded, "parameters", "info" if export else "warning")
        state = {
            path: (next(iter(trained)), dtype)
            for path, dtype in event.tensors.items()
            if len(trained := keys.get(path.rpartition(".")[2], set())) == 1 and _narrower(dtype, next(iter(trained)))
        }
        if state:
            yield _finding(event, state, "tensors of the optimizer's state", "warning")


Pair = tuple[torch.dtype, "torch.dtype | None"]


def _rounded(record: Record, event: Event) -> dict[str, Pair]:
    """Returns name of a parameter -> its dtype in training, and that in the file if it is narrower, else None."""
    found: dict[str, Pair] = {}
    names = {**record.trained, **{name.partition(".")[2]: dtype for name, dtype in record.trained.items()}}
    for path, dtype in event.tensors.items():
        tail = path
        while tail and tail not in names:
            tail = tail.partition(".")[2]
        if tail and names[tail].is_floating_point:
            found[tail] = names[tail], dtype if _narrower(dtype, names[tail]) else None
    return found


def _narrower(dtype: torch.dtype, trained: torch.dtype) -> bool:
    return dtype.is_floating_point and trained.is_floating_point and dtype.itemsize < trained.itemsize


def _finding(event: Event, rounded: dict[str, Pair], what: str, level: str) -> Finding:
    trained, dtype = next(iter(rounded.values()))
    assert dtype is not None
    names = list(rounded)
    return Finding(
        "saved-in-another-dtype",
        level,
        f"{event.file} has {len(rounded)} {what} in {short(dtype)} that were trained in {short(trained)}: "
        f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}",
        "a file for use may be narrower; whoever goes on training from it begins with rounded values, and what the "
        "last "
        "steps added is lost where it is smaller than a rounding step",
        Remedy(
            torch="save model.state_dict() as it is to go on from, and cast a copy of it for use: "
            "{k: v.to(torch.bfloat16) for k, v in model.state_dict().items()}; model.half() changes the model itself",
            ours=_OURS,
            lightning='fabric.save(path, {"model": model, "optimizer": optimizer})',
            trainer="leave ModelCheckpoint's file as it is, without a cast in on_save_checkpoint; cast a copy for use",
            accelerate="accelerator.save_state(folder)",
            transformers="leave checkpoints to Trainer, or trainer.save_model(folder)",
            deepspeed="engine.save_checkpoint(folder)",
        ),
        line=event.line,
        module=names[0].rpartition(".")[0] if len({name.rpartition(".")[0] for name in names}) == 1 else "",
    )


RULES = (scaler_not_saved, saved_in_another_dtype)
