"""Recording of passes as CUDA graphs, the same for the transformer and every decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class GraphRecorder:
    """Records passes on a CUDA device as graphs, on a stream of its own.

    The graphs share one pool of memory, so no two of them may run at the same time.
    """

    def __init__(self, device: torch.device) -> None:
        # a graph keeps the priority of the stream it was recorded on
        self.stream = torch.cuda.Stream(device, priority=torch.cuda.current_stream(device).priority)
        self._pool: Any = None

    def record(self, run: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        """Return the graph of a pass, and the result that each replay overwrites.

        run: the pass. It must have run before, so that libraries have chosen kernels and Triton has compiled. The host
            waits for what ran on `stream`.
        """
        graph = torch.cuda.CUDAGraph()
        self.stream.synchronize()  # what ran on it before, with its exchanges between ranks
        torch.cuda.empty_cache()  # graphs have memory of their own, and torch frees none while it records
        with torch.cuda.stream(self.stream):
            # not torch.cuda.graph, which waits for the whole device, where another thread may be recording as well;
            # thread_local: another thread may decode at the same time
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = run()
            finally:
                graph.capture_end()
        self._pool = graph.pool()
        return graph, result
