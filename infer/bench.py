"""Measure streaming and print JSON: `python -m longvideo.infer.bench --seconds 60`.

first_frame_s counts from the request and from the start of the process, imports and loading included. frames_per_s is
the rate after the first frame. peak_rss_mib has one value per part of the video that came out, a chunk but for the
first, whose opening frame comes alone: the most memory the process ever held until then.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import time
from pathlib import Path
from typing import Annotated, Any

import typer

WARM_CHUNKS = 20
KIB_PER_MIB = 1024


def bench(
    model: Annotated[str, typer.Option(help="`tiny`, a model folder or a Hugging Face id.")] = "tiny",
    prompt: Annotated[str, typer.Option(help="What to show.")] = "a red ball bounces",
    seconds: Annotated[float, typer.Option(help="Length of the video; 600 for the memory bar.")] = 20.0,
    steps: Annotated[int | None, typer.Option(help="Solver steps a chunk.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    device: Annotated[str | None, typer.Option(help="`cuda` or `cpu`.")] = None,
    decode_device: Annotated[str | None, typer.Option(help="Where latents become pixels.")] = None,
    precision: Annotated[str | None, typer.Option(help="bf16, nvfp4 or nvfp4-weights.")] = None,
    kv_cache: Annotated[str, typer.Option(help="bf16 or nvfp4.")] = "bf16",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the video too, and time that.")] = None,
) -> None:
    """Stream a video and print what it took, as JSON."""
    started = _process_start()
    import torch

    from longvideo.infer.host_memory import release_large_blocks
    from longvideo.infer.pipeline import StreamingPipeline
    from longvideo.infer.writer import VideoWriter

    imported = time.time()
    release_large_blocks()
    pipeline = StreamingPipeline.from_pretrained(
        model, device=device, decode_device=decode_device, precision=precision, kv_cache=kv_cache
    )
    requested = time.time()
    times: list[float] = []
    frames_made: list[int] = []
    peaks: list[float] = []
    writer = VideoWriter(output, fps=pipeline.fps, overwrite=True) if output else None
    for frames in pipeline.stream(prompt, seconds=seconds, steps=steps, guidance=guidance):
        if writer:
            writer.write(frames)
        times.append(time.time())
        frames_made.append(len(frames))
        peaks.append(_peak_rss_mib())
    if writer:
        writer.close()
    models = pipeline.models
    report = {
        "model": model,
        "device": _device_name(models.device),
        "decode_device": _device_name(models.decode_device),
        "dtype": str(models.transformer.patch_embedding.weight.dtype).removeprefix("torch."),
        "precision": precision,
        "kv_cache": kv_cache,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "steps": models.settings.steps if steps is None else steps,
        "guidance": models.settings.guidance if guidance is None else guidance,
        "frames": sum(frames_made),
        "import_s": _rounded(started and imported - started),
        "load_s": _rounded(requested - imported),
        "first_frame_s": {
            "from_request": _rounded(times[0] - requested),
            "from_process_start": _rounded(started and times[0] - started),
        },
        "frames_per_s": _rounded(_rate(times, frames_made)),
        "peak_rss_mib": [round(peak, 1) for peak in peaks],
        "peak_rss_growth_after_20_chunks": _growth(peaks),
    }
    print(json.dumps(report, indent=2))


def _rate(times: list[float], frames: list[int]) -> float | None:
    return sum(frames[1:]) / (times[-1] - times[0]) if len(times) > 1 else None


def _growth(peaks: list[float]) -> float | None:
    return round(peaks[-1] / peaks[WARM_CHUNKS - 1] - 1, 4) if len(peaks) > WARM_CHUNKS else None


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _peak_rss_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / KIB_PER_MIB / (KIB_PER_MIB if platform.system() == "Darwin" else 1)


def _process_start() -> float | None:
    """Return the wall-clock time at which this process was started, where Linux tells it."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return None
    age = uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - age


def _device_name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.processor() or 'unknown'})"


if __name__ == "__main__":
    typer.run(bench)
