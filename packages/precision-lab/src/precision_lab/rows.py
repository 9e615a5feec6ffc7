"""A row for each mode before anything is trained: which of them this machine and the strategy run.

On a CPU that is found out in this process. A GPU is asked by a child: asking makes a context there, hundreds of MB that
would lie beside what is measured for as long as this process lives.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from precision_core import Policy, Support, supports
from precision_core.support import is_core_mode, refusal, resolve_precision, resolve_strategy
from precision_lab.process import ChildFailed, last_line
from precision_lab.results import Row, Status, policy_as_dict
from precision_lab.variants import split_variants


def ask_for_rows(modes: Sequence[str], device_type: str, **options: Any) -> list[Row]:
    """Returns what `make_rows` does for the same arguments, without a context on a GPU in this process.

    Raises:
        ValueError: the strategy does not run on the device at all, or not in so many processes, or its package cannot
            be imported.
        ChildFailed: the child ended before it had an answer, with the last line that it wrote.
    """
    question = {"modes": list(modes), "device_type": device_type, **options}
    if device_type == "cpu":
        answer = _answer(question)
    else:
        child = subprocess.run(
            [sys.executable, "-m", "precision_lab.rows"], input=json.dumps(question), capture_output=True, text=True
        )
        if child.returncode:
            raise ChildFailed(last_line(child.stderr) or f"exit code {child.returncode}")
        answer = json.loads(child.stdout)
    if "error" in answer:
        raise ValueError(answer["error"])
    return [Row(**row) for row in answer["rows"]]


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    try:
        refusal_of("32-true", question["device_type"], question["strategy"], question["devices"])
    except (ValueError, ImportError) as error:
        return {"error": str(error)}
    return {"rows": [asdict(row) for row in make_rows(**question)]}


def make_rows(
    modes: Sequence[str], device_type: str, *, named: bool, run_slow: bool, strategy: str = "auto", devices: int = 1
) -> list[Row]:
    """Returns a row for each mode, in the spelling of `parse_modes`; a row with a `reason` is not to be run.

    Modes that are slow on the device have one unless they were `named` or `run_slow` is set. Modes that cannot run on
    it, or under that strategy, have one; where they were named, they have failed.
    """
    rows = []
    for mode in modes:
        precision, variants = split_variants(mode)
        is_core = is_core_mode(precision)
        policy = policy_as_dict(Policy.parse(precision)) if is_core else None
        answer = _supports(precision, device_type, strategy)
        if answer and (refused := refusal_of(precision, device_type, strategy, devices)):
            answer = Support("no", refused)
        if answer and variants and strategy not in ("auto", "ddp"):
            answer = Support("no", f"+{variants[0]} has not been tried under {strategy}: one device, or ddp")
        status: Status = "failed" if named and not answer else "not run"
        # A package's mode that is slow is one that computes in plain torch what other hardware would: that is its use.
        runs = named or run_slow or not is_core
        reasons = {"slow": "" if runs else f"{answer.reason}; --all runs it", "no": answer.reason}
        note = answer.reason if answer.level == "slow" and runs else ""
        rows.append(Row(mode, status, reasons.get(answer.level, ""), policy=policy, note=note))
    return rows


def _supports(mode: str, device_type: str, strategy: str) -> Support:
    try:
        return supports(mode, device_type, strategy)
    except ImportError as error:  # some package's rows cannot be read: if it matters, the run itself will say so
        return Support("native", str(error))


def refusal_of(mode: str, device_type: str, strategy: str, devices: int) -> str | None:
    """Returns why a named strategy does not run `mode`; None: plugin and strategy can be constructed together.

    Raises:
        ValueError: it does not run on the device at all, or not in so many processes.
        ImportError: the package that brings it cannot be imported.
    """
    if strategy == "auto":  # those of core, which run all of its modes
        return None
    under, _ = resolve_strategy(strategy, device_type, devices, 1)
    try:
        return refusal(resolve_precision(mode, under), under)
    except ValueError as error:
        return str(error)
    except ImportError:  # of the package that brings the mode: as above
        return None


def main() -> None:
    """Answers the question on stdin, for a parent that must not ask itself."""
    lines = os.fdopen(os.dup(1), "w")  # whatever a library prints belongs to stderr
    os.dup2(2, 1)
    print(json.dumps(_answer(json.load(sys.stdin))), file=lines, flush=True)


if __name__ == "__main__":
    main()
