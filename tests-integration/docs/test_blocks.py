"""Every Python block of the site runs as it is pasted: alone, unless the sentence before says what it goes on from.

Pages are those of docs/ and the packages' READMEs. A block
"goes on from the block above", "from there", or "from the first block" of the page, and has their names.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from precision_core.testing import run_in_ranks

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("packages/*/README.md"), *ROOT.glob("examples/*/README.md")]
GOES_ON = re.compile(r"\bgoes on from (there|the block above|(?P<first>the first block))\b")
ELSEWHERE = {"packages/precision-core/README.md", "packages/precision-xla/README.md"}
"""READMEs that their packages' own tests run: core's wheel is tested with it, XLA has an environment of its own."""
VENDORS = {"deepspeed", "peft", "transformers"}
"""What takes seconds to import: such blocks are in the full tier."""
OURS = {"precision_bnb", "precision_deepspeed", "precision_fsdp", "precision_te", "precision_xla"}
STARTS = ("fabric.launch()", "init_process_group(", "deepspeed.initialize(")
"""What joins several processes: such blocks run in two."""
WARNS = (
    "ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning",  # peft 0.21 of transformers 5.24
    "ignore:.*torch.jit.script.* is deprecated:DeprecationWarning",  # DeepSpeed of torch 2.13, and the next
    "ignore:`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated:FutureWarning",
)
"""What vendors do, and we have no hand in."""


def chains(page: str) -> list[list[str]]:
    """Returns the blocks of a page, those that go on from each other together."""
    found: list[list[str]] = []
    parts = re.split(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    for text, block in zip(parts[::2], parts[1::2], strict=False):  # the last text has no block behind it
        said = GOES_ON.search(" ".join(text.strip().rpartition("\n\n")[2].split()))
        if said and said["first"]:
            found.append([found[0][0], block])
        elif said:
            found[-1].append(block)
        else:
            found.append([block])
    return found


def cases() -> list[Any]:
    found = []
    for page in sorted(PAGES):
        name = page.relative_to(ROOT).as_posix()
        if name in ELSEWHERE:
            continue
        for number, chain in enumerate(chains(page.read_text()), 1):
            is_heavy = imported(chain) & (VENDORS | {"precision_deepspeed"})
            marks = [pytest.mark.full] if is_heavy else []
            found.append(pytest.param(name, chain, id=f"{name}-{number}", marks=marks))
    return found


def imported(chain: list[str]) -> set[str]:
    return set(re.findall(r"^(?:from|import) (\w+)", "\n".join(chain), re.MULTILINE))


@pytest.mark.filterwarnings(*WARNS)
@pytest.mark.parametrize(("name", "chain"), cases())
def test_a_block_runs(name: str, chain: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = imported(chain) & (VENDORS | OURS)
    needed |= {f"precision_{each}" for each in re.findall(r'"(?:bf16-)?(fsdp|deepspeed|kahan)"', "".join(chain))}
    for module in sorted(needed):
        pytest.importorskip(module, reason=f"{module} is not installed here")
    monkeypatch.chdir(tmp_path)
    if any(start in "".join(chain) for start in STARTS):
        run_in_ranks(2, run, name, chain)
    else:
        run(name, chain)


def run(name: str, chain: list[str]) -> None:
    state = torch.get_rng_state()
    names: dict[str, Any] = {"__name__": "pasted"}
    try:
        for block in chain:
            exec(compile(block, name, "exec"), names)
    finally:
        torch.set_rng_state(state)


def test_blocks_that_go_on_are_found() -> None:
    says = (
        "",
        "This goes on\nfrom there:",
        "It goes on from there.\n\nAlone:",
        "Goes on. It goes on from the first block:",
    )
    page = "# A\n\n" + "".join(f"{text}\n\n```python\n{number}\n```\n\n" for number, text in enumerate(says))
    assert chains(page) == [["0\n", "1\n"], ["2\n"], ["0\n", "3\n"]]
    assert sum(map(len, (chains(page.read_text()) for page in PAGES))) > 30


@pytest.mark.full
@pytest.mark.slow_start
def test_the_plugin_that_a_page_writes_meets_the_contract(tmp_path: Path) -> None:
    plugin, contract = chains((ROOT / "docs" / "plugins" / "write.md").read_text())[-1]
    (tmp_path / "test_noisy.py").write_text(f"{plugin}\n\n{contract}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
