"""Time that `import precision_core` takes beyond `import torch`.

Fresh processes import torch alone and torch with precision_core in turn. The difference between the two kinds is noisy,
as torch takes seconds; so the second kind also times its second import by itself, which is the same quantity without
torch's noise. That one is held against the target, at most 50 ms. All are medians over the processes, of the CPU time,
so that other work on the machine does not count. The same processes then list the modes of installed plugins.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from _measure import print_table, verdict

TARGET = 50.0
LISTING_TARGET = 5.0
CHILD = """
import sys, time
start = time.process_time()
import torch
middle = time.process_time()
if sys.argv[1] == "both":
    import precision_core
end = time.process_time()
listing = 0.0
if sys.argv[1] == "both":
    from precision_core import discovery
    before = time.process_time()
    discovery.names(discovery.PLUGINS)
    listing = time.process_time() - before
print(middle - start, end - middle, listing)
"""


def main() -> None:
    options = argparse.ArgumentParser(description="Time of the import beyond torch's.")
    options.add_argument("--pairs", type=int, default=5, help="pairs of processes")
    given, _ = options.parse_known_args()  # other benchmarks may be run with the same arguments
    run("both")  # writes byte code and warms the file cache
    alone, both, own, listings = [], [], [], []
    for _ in range(given.pairs):
        alone.append(sum(run("torch")[:2]))
        torch_first, ours, listing = run("both")
        both.append(torch_first + ours)
        own.append(ours)
        listings.append(listing)
    torch_ms, both_ms, own_ms, listing_ms = (1000 * statistics.median(times) for times in (alone, both, own, listings))
    head = ["imported", "ms", "beyond torch", "by itself", "spread", "target"]
    rows = [
        ["torch", f"{torch_ms:.0f}", "", "", "", ""],
        [
            "torch, precision_core",
            f"{both_ms:.0f}",
            f"{both_ms - torch_ms:+.0f} ms",
            f"{own_ms:.1f} ms",
            f"{1000 * min(own):.1f} to {1000 * max(own):.1f}",
            verdict(own_ms, TARGET),
        ],
        [
            "names of plugins, listed",
            f"{listing_ms:.1f}",
            "",
            "",
            f"{1000 * min(listings):.1f} to {1000 * max(listings):.1f}",
            verdict(listing_ms, LISTING_TARGET),
        ],
    ]
    print_table("import", head, rows)


def run(what: str) -> tuple[float, float, float]:
    """Returns the seconds for torch, for precision_core, and for listing the plugins, in a fresh process."""
    done = subprocess.run([sys.executable, "-c", CHILD, what], capture_output=True, text=True, check=True)
    first, second, listing = done.stdout.split()
    return float(first), float(second), float(listing)


if __name__ == "__main__":
    main()
