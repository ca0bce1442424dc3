"""Large blocks return to the system, whatever is stored around them."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import torch
from longvideo.infer.host_memory import release_large_blocks
assert release_large_blocks()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
torch.ones(2**20)
before = resident()
for size in (12, 20, 28, 9, 31):
    kept = torch.ones(1000)
    block = torch.ones(size * 2**18)
    assert resident() > before + size - 2
    del block
    assert resident() < before + 4, (size, resident(), before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the option is glibc's")
def test_freed_blocks_leave_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
