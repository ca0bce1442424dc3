"""Read many clips ahead of their use, in other processes."""

from __future__ import annotations

import os
import signal
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.data.clips import ClipReference, read_clip
from longvideo.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    import numpy as np


def read_in_order(
    clips: Sequence[ClipReference], *, size: tuple[int, int], workers: int
) -> Generator[Tensor | str, None, None]:
    """Yield for each clip its frames uint8 [T, H, W, 3], or the reason why it cannot be read.

    size: height and width in pixels. workers: processes, each of which reads one clip ahead; 0 reads in this process.
    Frames are sent through pipes, so no shared memory is needed.
    """
    read = partial(_read_frames, size=size)
    if workers == 0:
        yield from (_to_tensor(read(clip)) for clip in clips)
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_follow_parent)
    pending: deque[Future[np.ndarray | str]] = deque()
    try:
        for clip in clips:
            pending.append(pool.submit(read, clip))
            if len(pending) > workers:
                yield _to_tensor(pending.popleft().result())
        while pending:
            yield _to_tensor(pending.popleft().result())
    except BrokenProcessPool as error:
        raise UserError(
            "a process that decodes video was killed, perhaps because memory was short; use fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _read_frames(clip: ClipReference, *, size: tuple[int, int]) -> np.ndarray | str:
    try:
        return read_clip(clip, size=size).frames.numpy()
    except UserError as error:
        return str(error)


def _to_tensor(frames: np.ndarray | str) -> Tensor | str:
    return frames if isinstance(frames, str) else torch.from_numpy(frames)


def _follow_parent() -> None:
    """Ignore Ctrl-C, which the parent handles, and end when the parent ends, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None
    Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
