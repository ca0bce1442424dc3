"""Record what GPUs do, kernel by kernel, and draw it: a row for each stream of each GPU."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

KINDS = (
    ("attention", r"sdpa|flash|fmha", (214, 96, 77)),
    ("decoder, between convolutions", r"norm_silu|to_pixels", (146, 197, 222)),
    ("convolutions", r"conv|fprop|implicit", (33, 102, 172)),
    ("products", r"nvjet|gemm|cutlass|cublas", (244, 165, 130)),
    ("cache in 4 bits", r"rebuild|write_kernel|maxima", (118, 42, 131)),
    ("between products", r"_norm|_quantize|_write_out|gelu", (90, 174, 97)),
    ("copies", r"memcpy|copy", (150, 150, 150)),
)
"""Kinds of kernels: label, pattern in the name of the kernel, and color. The first pattern that matches decides."""
OTHER = ("other", (200, 200, 200))
WIDTH, ROW, MARGIN, LABEL = 1600, 44, 28, 150


@dataclass(frozen=True)
class Span:
    """A kernel or a copy on a stream of a GPU. begin, end: times in milliseconds. kind: a label of `KINDS`."""

    gpu: int
    stream: int
    begin: float
    end: float
    kind: str


def record(work: Callable[[], object]) -> list[Span]:
    """Call a function and return everything that ran on the GPUs; times are relative to the first kernel."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as session:
        work()
    profiler = session.profiler
    assert profiler is not None and profiler.kineto_results is not None
    events = [event for event in profiler.kineto_results.events() if event.device_type().name == "CUDA"]
    first = min((event.start_ns() for event in events), default=0)
    return [
        Span(
            event.device_index(),
            event.device_resource_id(),
            (event.start_ns() - first) / 1e6,
            (event.end_ns() - first) / 1e6,
            kind_of(event.name()),
        )
        for event in events
        if event.duration_ns() > 0
    ]


def kind_of(name: str) -> str:
    """Return the kind of a kernel, by its name."""
    return next((kind for kind, pattern, _ in KINDS if re.search(pattern, name, re.IGNORECASE)), OTHER[0])


def share_by_kind(spans: Sequence[Span]) -> dict[str, dict[str, float]]:
    """Return the fraction of the time by GPU and kind. Streams that run at the same time are added up."""
    whole = max(span.end for span in spans)
    shares: dict[str, dict[str, float]] = {}
    for span in spans:
        kinds = shares.setdefault(f"GPU {span.gpu}", {})
        kinds[span.kind] = kinds.get(span.kind, 0.0) + (span.end - span.begin) / whole
    return {gpu: dict(sorted(kinds.items(), key=lambda item: -item[1])) for gpu, kinds in sorted(shares.items())}


def draw(spans: Sequence[Span], *, begin: float, end: float, title: str) -> Image.Image:
    """Return a picture of the spans between two times, in milliseconds.

    Streams that are busy for less than 1 % of the time are left out.
    """
    inside = [span for span in spans if span.end > begin and span.begin < end]
    busy: dict[tuple[int, int], float] = {}
    for span in inside:
        key = (span.gpu, span.stream)
        busy[key] = busy.get(key, 0.0) + min(span.end, end) - max(span.begin, begin)
    rows = sorted(key for key, time in busy.items() if time > 0.01 * (end - begin))
    height = 2 * MARGIN + ROW * (len(rows) + 2)
    picture = Image.new("RGB", (WIDTH, height), "white")
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(size=15)
    canvas.text((MARGIN, MARGIN // 2), title, fill="black", font=font)
    per_ms = (WIDTH - LABEL - 2 * MARGIN) / (end - begin)

    def column(time: float) -> float:
        return LABEL + MARGIN + (min(max(time, begin), end) - begin) * per_ms

    colors = {kind: color for kind, _, color in KINDS} | dict([OTHER])
    for number, key in enumerate(rows):
        top = 2 * MARGIN + ROW * number
        share = min(busy[key] / (end - begin), 1.0)
        canvas.text((MARGIN, top + 8), f"GPU {key[0]}, {share:.0%} busy", fill="black", font=font)
        for span in inside:
            if (span.gpu, span.stream) == key:
                left, right = column(span.begin), column(span.end)
                canvas.rectangle((left, top, max(right, left), top + ROW - 12), fill=colors[span.kind])
    bottom = 2 * MARGIN + ROW * len(rows)
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**9) if (end - begin) / step <= 12)
    for tick in range(0, int(end - begin) + 1, step):
        canvas.line((column(begin + tick), bottom - 8, column(begin + tick), bottom), fill="black")
        canvas.text((column(begin + tick) + 3, bottom - 6), f"{tick} ms", fill="black", font=font)
    left = MARGIN
    for kind in [kind for kind in colors if any(span.kind == kind for span in inside)]:
        canvas.rectangle((left, bottom + 26, left + 14, bottom + 40), fill=colors[kind])
        canvas.text((left + 20, bottom + 24), kind, fill="black", font=font)
        left += 40 + int(canvas.textlength(kind, font=font))
    return picture
