"""Time the loading of a packed transformer with random weights, and measure the peak of the device's memory."""

from __future__ import annotations

import gc
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.settings import ModelSettings
from longvideo.infer.bench.step import random_model
from longvideo.quantization.convert import quantize_layers, set_product
from longvideo.quantization.products import choose_w4a4

if TYPE_CHECKING:
    from longvideo.model.config import TransformerConfig


@dataclass(frozen=True)
class LoadTiming:
    """Time and memory of loading.

    seconds: time from opening the folder until the layers can multiply, with the files in the page cache. file_bytes:
    size of the files with the weights. model_bytes: size of parameters and buffers. peak_bytes: largest memory that
    PyTorch reserved on the device; 0 on a CPU.
    """

    seconds: float
    file_bytes: int
    model_bytes: int
    peak_bytes: int


@torch.inference_mode()
def time_loading(config: TransformerConfig, *, device: torch.device, folder: Path | None = None) -> LoadTiming:
    """Pack a transformer, write it to a temporary folder, and load it.

    folder: parent of the temporary folder; None means the one of the system.
    Raises OSError where the packed weights, 0.6 bytes for each weight, do not fit on the disk.
    """
    is_gpu = device.type == "cuda"
    with tempfile.TemporaryDirectory(dir=folder) as name:
        model = random_model(config, device)
        quantize_layers(model)
        settings = ModelSettings(text_len=config.text_len)
        saved = ModelFolder.save(Path(name) / "packed", settings=settings, transformer=model)
        del model
        gc.collect()
        if is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        loaded = ModelFolder.open(saved.path).load_transformer(device=device)
        set_product(loaded, choose_w4a4(device))
        if is_gpu:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        tensors = (*loaded.parameters(), *loaded.buffers())
        return LoadTiming(
            seconds=seconds,
            file_bytes=sum(file.stat().st_size for file in (saved.path / "transformer").glob("*.safetensors")),
            model_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            peak_bytes=torch.cuda.max_memory_reserved(device) if is_gpu else 0,
        )
