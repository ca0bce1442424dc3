"""A model of Wan2.2-TI2V-5B's size is converted to every format and back in under 3 GB of memory.

The tests need `--full-size FOLDER` with 50 GB of free space, and take some minutes.
"""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from longvideo.checkpoint.conversion import ConversionOptions, convert_model
from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.locations import SHIPPED
from longvideo.checkpoint.settings import PRESETS as PRESET_SETTINGS
from longvideo.checkpoint.settings import ModelSettings
from longvideo.infer.pipeline import StreamingPipeline
from longvideo.model.config import PRESETS
from longvideo.vae.config import AutoencoderConfig
from tests.checkpoint.random_weights import UMT5_XXL, fingerprints, random_model

MEMORY_LIMIT = 3e9
TARGETS = ("longvideo", "diffusers", "longvideo", "official")
MEASURE = """
import resource, sys
from longvideo.cli.main import main
code = main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(code)
"""


@pytest.fixture
def workspace(pytestconfig: pytest.Config) -> Path:
    """Return an empty folder on the disk of `--full-size`."""
    folder = pytestconfig.getoption("--full-size")
    if folder is None:
        pytest.skip("takes 50 GB and minutes; use --full-size FOLDER")
    return Path(tempfile.mkdtemp(prefix="full_size_", dir=folder))


@pytest.mark.timeout(3600)
def test_every_tensor_of_the_5b_survives_all_formats(workspace: Path) -> None:
    try:
        model, source = random_5b(), workspace / "0"
        convert_model(model, source, ConversionOptions("official"))
        num_bytes = sum(model.weights(part).num_bytes for part in model.parts)
        before = fingerprints(model)
        print(f"\n{len(before)} tensors, {num_bytes / 1e9:.2f} GB")
        for number, target in enumerate(TARGETS, start=1):
            peak, seconds = _convert(source, workspace / str(number), target)
            print(f"to {target}: {seconds:.0f} s, {num_bytes / 1e9 / seconds:.2f} GB/s, peak {peak / 1e9:.2f} GB")
            assert peak < MEMORY_LIMIT
            shutil.rmtree(source)
            source = workspace / str(number)
        assert fingerprints(ModelFolder.open(source)) == before
        peak, seconds = _convert(source, workspace / "packed", "longvideo", "--precision", "nvfp4")
        print(f"to nvfp4: {seconds:.0f} s, peak {peak / 1e9:.2f} GB")
        assert peak < MEMORY_LIMIT
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


@pytest.mark.gpu
@pytest.mark.timeout(1800)
def test_the_files_of_wan_and_of_longlive_stream_as_they_are(workspace: Path) -> None:
    wan, longlive = workspace / "Wan2.2-TI2V-5B", workspace / "model_bf16.pt"
    try:
        convert_model(random_5b(), wan, ConversionOptions("official"))
        convert_model(ModelFolder.open(wan), longlive, ConversionOptions("longlive"))
        print()
        for name, base, precision, kv_cache in (
            (wan, None, None, "bf16"),
            (longlive, wan, None, "bf16"),
            (longlive, wan, "nvfp4-weights", "nvfp4"),
        ):
            started = time.perf_counter()
            pipe = StreamingPipeline.from_pretrained(
                name, base=base, device="cuda:0", precision=precision, kv_cache=kv_cache
            )
            loaded = time.perf_counter() - started
            frames = pipe.stream("a red ball", seconds=2.0, steps=2, guidance=1.0)
            first = next(frames)
            seconds = time.perf_counter() - started
            shapes = [first.shape, *(part.shape for part in frames)]
            assert shapes == [(count, 704, 1280, 3) for count in (1, 28, 19)]
            print(f"{name.name}, {precision or 'bf16'}: loaded in {loaded:.1f} s, first frame after {seconds:.1f} s")
            assert pipe.models.settings == PRESET_SETTINGS["longlive-2.0-5b" if base else "wan2.2-ti2v-5b"]
            del pipe, frames
            gc.collect()
            torch.cuda.empty_cache()
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def random_5b() -> ModelFolder:
    return random_model(
        PRESETS["wan2.2-ti2v-5b"],
        AutoencoderConfig.wan22(),
        UMT5_XXL,
        settings=ModelSettings(),
        tokenizer=SHIPPED["tiny"] / "tokenizer",
    )


def _convert(source: Path, destination: Path, target: str, *options: str) -> tuple[int, float]:
    """Run the command in a process of its own; return its peak memory in bytes and its seconds."""
    arguments = ["convert", str(source), str(destination), "--to", target, *options]
    started = time.perf_counter()
    ran = subprocess.run([sys.executable, "-P", "-c", MEASURE, *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout.split("peak ")[-1]), time.perf_counter() - started
