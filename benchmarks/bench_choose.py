"""Is `precision choose` right? Eight models; every verdict is checked by full runs with five fresh seeds.

    python benchmarks/bench_choose.py                      # all of choose_models.py, then a table
    python benchmarks/bench_choose.py conv ViT --out DIR   # some; DIR keeps what is done, and the table has all of it

For each model: the choice, then every candidate that was judged, or is cheaper, trained with five seeds that the
choice has not seen. Truly safe: no run fails, and the held-out loss is on average at most one standard deviation of
32-true's above it. The cheapest truly safe candidate is what the choice's bytes are compared with. MiniLM is read from
the folder that the environment variable MINILM names.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from choose_models import MODELS, is_here
from rich.console import Console

from precision_lab import choose
from precision_lab.choice import Choice
from precision_lab.process import Child, Fork
from precision_lab.runs import Runs
from precision_lab.taskfile import guarded

UNSAFE = ("worse", "undecided", "failed")
SEEDS = [5000 + n for n in range(5)]


def check(name: str, console: Console) -> dict[str, Any]:
    """Returns the choice for a model, and what is true."""
    make, steps, modes = MODELS[name]
    start = time.perf_counter()
    choice = choose(make, modes, steps=steps, accelerator="cpu", run_slow=modes is not None, console=console)
    seconds = time.perf_counter() - start
    print(choice)
    if make is None:
        runs = Runs("", "1m", "cpu", Child, console)
    else:
        made = guarded(make)
        runs = Runs(name, "1m", "cpu", lambda job, told: Fork(job, made, told), console)
    base = runs.single("32-true", steps, SEEDS)
    spread = statistics.stdev(row.held_out_loss or 0.0 for row in base)
    candidates = []
    answer = choice.find(choice.precision)
    for each in choice.candidates:
        larger = answer is not None and (each.bytes or 0) > (answer.bytes or 0)
        if each.judged == "not run" and larger:
            continue  # neither a verdict to check, nor cheaper than the answer
        rows = base if each.precision == "32-true" else runs.single(each.precision, steps, SEEDS)
        done = len(rows) == len(SEEDS) and all(row.status == "done" for row in rows)
        pairs = [(row.held_out_loss or 0.0) - (b.held_out_loss or 0.0) for row, b in zip(rows, base, strict=False)]
        difference = statistics.fmean(pairs) if done else None
        candidates.append(
            {
                "precision": each.precision,
                "judged": each.judged,
                "bytes": each.bytes,
                "difference": difference,
                "safe": difference is not None and difference <= spread,
                "unchanged": max(row.unchanged_share for row in rows) if done else None,
            }
        )
    return {
        "model": name,
        "precision": choice.precision,
        "reasons": choice.reasons,
        "seconds": seconds,
        "steps": steps,
        "spread": spread,
        "seeds": seeds_of(choice),
        "candidates": candidates,
    }


def seeds_of(choice: Choice) -> int | None:
    """Returns with how many seeds the answer was judged."""
    found = choice.find(choice.precision)
    return found.evidence.seeds if found is not None and found.evidence is not None else None


def row(found: dict[str, Any]) -> list[str]:
    """Returns the model's line of the table."""
    candidates, chosen = found["candidates"], found["precision"]
    by_name = {each["precision"]: each for each in candidates}
    mine = by_name[chosen]
    best = min((each for each in candidates if each["safe"] and each["bytes"]), key=lambda each: each["bytes"])
    wrong = [each["precision"] for each in candidates if each["judged"] == "safe" and not each["safe"]]
    unsafe = [each["precision"] for each in candidates if each["judged"] in UNSAFE and each["safe"]]
    swallows = [each["precision"] for each in candidates if each["judged"] == "swallows" and each["safe"]]
    difference = mine["difference"] / found["spread"]
    return [
        found["model"],
        str(found["steps"]),
        f"`{chosen}`",
        f"{difference:+.2f}",
        ", ".join(wrong) or "none",
        ", ".join(unsafe) or "none",
        ", ".join(swallows) or "none",
        f"{mine['bytes'] / by_name['32-true']['bytes']:.2f}",
        f"{best['bytes'] / by_name['32-true']['bytes']:.2f} (`{best['precision']}`)",
        f"{found['seconds']:.0f} s",
    ]


def table(folder: Path) -> str:
    """Returns what was found of all models, in Markdown."""
    heads = ["model", "steps", "chosen", "fresh seeds: spreads", '"safe" and is not', '"unsafe" and is safe']
    heads += ['"swallows", loss is as good', "bytes, x 32-true", "least that is safe", "time"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for name in MODELS:
        path = folder / f"{name.replace(' ', '-')}.json"
        if path.is_file():
            lines.append("| " + " | ".join(row(json.loads(path.read_text()))) + " |")
    return "\n".join(lines)


def main() -> None:
    """Checks the models that are named, and prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"{', '.join(MODELS)}; all without one")
    parser.add_argument("--out", default="bench-choose", help="folder of what was found")
    parser.add_argument("--table", action="store_true", help="only print the table of what is in that folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.table:
        print(table(folder))
        return
    for name in arguments.models or MODELS:
        if not is_here(name):
            print(f"{name}: left out, set MINILM to its folder")
            continue
        found = check(name, Console(highlight=False))
        (folder / f"{name.replace(' ', '-')}.json").write_text(json.dumps(found, indent=1))
        print(table(folder), flush=True)


if __name__ == "__main__":
    main()
