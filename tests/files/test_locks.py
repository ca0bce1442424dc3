"""A lock ends with its process."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from longvideo.files import BusyError, locked

HOLD = """
import sys, time
from pathlib import Path
from longvideo.files import locked
with locked(Path(sys.argv[1]), busy=""):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_refused_while_its_process_lives(tmp_path: Path) -> None:
    lock = tmp_path / "run.lock"
    command = [sys.executable, "-c", HOLD, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match="it is busy"), locked(lock, busy="it is busy"):
            pass
        assert lock.exists()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with locked(lock, busy="it is busy"):
        pass
    assert not lock.exists()
