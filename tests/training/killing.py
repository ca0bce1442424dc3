"""Kill a run with SIGKILL at drawn moments, and start it again, until it ends by itself."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Sequence
from typing import Any


def run_killed(
    work: Callable[..., None], *arguments: Any, kills: int, most_steps: int, preloaded: Sequence[str] = ()
) -> None:
    """Call `work(*arguments, reports)` in processes, each killed after 1 to most_steps reports, the last after none.

    work: sends something through the connection `reports` for every step. preloaded: modules it imports.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preloaded))
    lottery, killed = random.Random(0), 0
    while True:
        reports, theirs = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(*arguments, theirs))
        process.start()
        theirs.close()
        left = lottery.randint(1, most_steps) if killed < kills else None
        try:
            while left != 0:
                reports.recv()
                left = None if left is None else left - 1
            os.kill(process.pid or 0, signal.SIGKILL)
            killed += 1
        except EOFError:
            pass
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert killed == kills
