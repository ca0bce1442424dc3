"""Counters of one server in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
CHUNK_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0)
HELP = {
    "longvideo_sessions_started_total": ("counter", "Live streams begun or continued."),
    "longvideo_sessions_refused_total": ("counter", "Live streams refused because all places were taken."),
    "longvideo_chunks_total": ("counter", "Chunks made by live streams."),
    "longvideo_frames_total": ("counter", "Frames made, by live streams and jobs."),
    "longvideo_segments_dropped_total": ("counter", "Segments left out for slow clients."),
}


class ServerMetrics:
    """Count from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._buckets = [0] * len(CHUNK_SECONDS)
        self._seconds = 0.0
        self._chunks = 0

    def count(self, name: str, by: int = 1) -> None:
        """Add to a counter, one of HELP."""
        assert name in HELP
        with self._lock:
            self._counts[name] += by

    def chunk_made(self, seconds: float) -> None:
        """Count a chunk and how long it took."""
        with self._lock:
            self._counts["longvideo_chunks_total"] += 1
            self._chunks += 1
            self._seconds += seconds
            for index, bound in enumerate(CHUNK_SECONDS):
                self._buckets[index] += seconds <= bound

    def text(self, *, live: int, jobs: Mapping[str, int]) -> str:
        """Return all of it. live: streams being made. jobs: how many have each status."""
        with self._lock:
            lines = _header("longvideo_sessions_live", "gauge", "Live streams being made.")
            lines.append(f"longvideo_sessions_live {live}")
            for name, (kind, text) in HELP.items():
                lines += [*_header(name, kind, text), f"{name} {self._counts[name]}"]
            lines += _header("longvideo_jobs", "gauge", "Jobs by status.")
            lines += [f'longvideo_jobs{{status="{status}"}} {number}' for status, number in jobs.items()]
            name = "longvideo_chunk_seconds"
            lines += _header(name, "histogram", "From the begin of a chunk to its frames in memory.")
            for bound, number in zip(CHUNK_SECONDS, self._buckets, strict=True):
                lines.append(f'{name}_bucket{{le="{bound:g}"}} {number}')
            lines.append(f'{name}_bucket{{le="+Inf"}} {self._chunks}')
            lines += [f"{name}_sum {self._seconds:.6f}", f"{name}_count {self._chunks}"]
        return "\n".join(lines) + "\n"


def _header(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
