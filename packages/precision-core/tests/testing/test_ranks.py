"""What is said of a rank that ends without a result."""

from __future__ import annotations

import os
import signal

import pytest

from precision_core.testing.ranks import RankError, run_in_ranks


def test_a_rank_that_was_killed_names_the_signal() -> None:
    with pytest.raises(
        RankError, match=f"rank 0 of 1:\nit died without a traceback: exit code -{int(signal.SIGKILL)},"
    ):
        run_in_ranks(1, lambda: os.kill(os.getpid(), signal.SIGKILL))
