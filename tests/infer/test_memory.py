"""What streaming will take of each GPU, against what was measured, and the refusal where that is not there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.settings import ModelSettings, chunk_spec
from longvideo.errors import UserError
from longvideo.infer import memory, pipeline
from longvideo.infer.memory import CONTEXT, GRAPHS, Part, check_memory, estimate
from longvideo.infer.pipeline import StreamingPipeline
from longvideo.model.config import PRESETS
from longvideo.number_formats import NumberFormats
from longvideo.streaming.slots import NVFP4Slots, PlainSlots
from longvideo.vae.autoencoder import Autoencoder
from longvideo.vae.config import AutoencoderConfig
from longvideo.vae.streaming import StreamingDecoder

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)
CONFIG = PRESETS["wan2.2-ti2v-5b"]
SETTINGS = ModelSettings(steps=2, guidance=1.0)

# torch.cuda.max_memory_allocated in GB from `longvideo bench stream` on H200s, random weights, 704x1280, 2 steps, a
# window of 32 latent frames: precision, cache, attention, share, what is on the GPU that denoises and on another one
MEASURED = [
    ("bf16", "bf16", "bf16", 0.0, (33.45,)),
    ("fp8", "bf16", "bf16", 0.0, (28.55,)),
    ("fp8", "bf16", "fp8", 0.0, (23.34,)),
    ("bf16", "bf16", "bf16", 0.09, (22.77, 11.23)),
    ("fp8", "bf16", "bf16", 0.15, (18.23, 10.88)),
    ("fp8", "bf16", "fp8", 0.23, (14.05, 10.72)),
    ("bf16", "bf16", "bf16", 0.0, (21.32, 12.31)),
    ("fp8", "bf16", "bf16", 0.0, (16.43, 12.31)),
    ("nvfp4-weights", "nvfp4", "bf16", 0.09, (8.98, 11.23)),
]
UNCOUNTED = (GRAPHS, CONTEXT)
"""Parts that `max_memory_allocated` does not count."""


def arguments(**changes: Any) -> dict[str, Any]:
    """Return arguments of `estimate` for the 5B in bf16 on one GPU, packed weights first, with changes."""
    given = {
        "spec": chunk_spec(SETTINGS),
        "settings": SETTINGS,
        "formats": NumberFormats("bf16"),
        "device": FIRST,
        "decode_device": FIRST,
        "decode_share": 0.0,
        "batch": 1,
        "text_encoder_bytes": 0,
        "dtype": torch.bfloat16,
        "loaded_in": torch.bfloat16,
    }
    return given | changes


def estimated(**changes: Any) -> list[Part]:
    return estimate(CONFIG, AutoencoderConfig.wan22(), **arguments(**changes))


def total(parts: Iterable[Part], device: torch.device = FIRST) -> int:
    return sum(part.bytes for part in parts if part.device == device)


def named(parts: Iterable[Part], device: torch.device = FIRST) -> dict[str, int]:
    own = [part for part in parts if part.device == device]
    assert max(Counter(part.name for part in own).values()) == 1
    return {part.name: part.bytes for part in own}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[torch.device]]:
    """Give the machine GPUs with this much free, in GB; return those that were asked."""

    def set_free(*free: float) -> list[torch.device]:
        asked: list[torch.device] = []

        def mem_get_info(device: torch.device) -> tuple[int, int]:
            asked.append(device)
            return int(free[device.index] * 1e9), 10**12

        monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
        monkeypatch.setattr(memory, "cuda_devices", lambda: [torch.device("cuda", index) for index in range(len(free))])
        return asked

    return set_free


def check(**changes: Any) -> None:
    check_memory(CONFIG, AutoencoderConfig.wan22(), **arguments(**changes))


@pytest.mark.parametrize(("precision", "kv_cache", "attention", "share", "measured"), MEASURED)
def test_the_estimate_meets_what_was_measured(
    precision: str, kv_cache: str, attention: str, share: float, measured: tuple[float, ...]
) -> None:
    parts = estimated(
        formats=NumberFormats(precision, kv_cache, attention),
        decode_device=(FIRST, SECOND)[len(measured) - 1],
        decode_share=share,
        loaded_in=None if precision == "nvfp4-weights" else torch.bfloat16,  # the peaks are without loading
    )
    for device, peak in zip((FIRST, SECOND), measured, strict=False):
        counted = total((part for part in parts if part.name not in UNCOUNTED), device)
        assert 0.95 * peak <= counted / 1e9 <= 1.15 * peak
        assert named(parts, device).keys() >= set(UNCOUNTED)


def test_the_decoder_takes_what_it_allocates() -> None:
    config = AutoencoderConfig.tiny()
    coder = Autoencoder(config)
    settings = replace(SETTINGS, height=64, width=96)
    height, width = (size // config.scale_factor_spatial for size in (settings.height, settings.width))
    decoder = StreamingDecoder(coder, batch=2, height=height, width=width)
    given = arguments(
        settings=settings, spec=chunk_spec(settings), batch=2, dtype=torch.float32, loaded_in=None, device=FIRST
    )
    kept = named(estimate(PRESETS["tiny"], config, **given))["decoder"]
    shared = {parameter.untyped_storage().data_ptr() for parameter in coder.parameters()}
    assert kept == pytest.approx(_allocated(decoder, shared), rel=0.01)


def _allocated(root: object, shared: set[int]) -> int:
    """Return the bytes of all tensors that an object of ours holds, those with shared memory left out."""
    sizes, waiting, seen = {}, [root], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif type(value).__module__.startswith("longvideo.vae") and not isinstance(value, torch.nn.Module):
            waiting += vars(value).values()
    return sum(size for pointer, size in sizes.items() if pointer not in shared)


@pytest.mark.parametrize("kv_cache", ["bf16", "nvfp4"])
def test_the_cache_takes_what_it_allocates(kv_cache: str) -> None:
    config, settings = PRESETS["tiny"], replace(SETTINGS, height=64, width=64)
    spec = chunk_spec(settings)
    new_slots = NVFP4Slots if kv_cache == "nvfp4" else PlainSlots
    slots = new_slots(
        spec,
        layers=config.num_layers,
        batch=2,
        heads=config.num_attention_heads,
        head_dim=config.attention_head_dim,
        dtype=torch.bfloat16,
        device=CPU,
    )
    tensors, waiting = {}, list(vars(slots).values())
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            tensors[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif hasattr(value, "key_mean"):
            waiting += vars(value).values()
    given = arguments(formats=NumberFormats("bf16", kv_cache), settings=settings, spec=spec, batch=2)
    parts = estimate(config, AutoencoderConfig.tiny(), **given)
    assert named(parts)["KV cache"] == pytest.approx(sum(tensors.values()), rel=0.01)


def test_guidance_doubles_the_cache_and_not_the_decoder() -> None:
    plain, guided = named(estimated()), named(estimated(settings=replace(SETTINGS, guidance=5.0)))
    assert guided["KV cache"] == 2 * plain["KV cache"]
    assert guided["decoder"] == plain["decoder"]


def test_a_model_that_is_quantised_on_the_way_needs_the_memory_of_the_whole_one() -> None:
    formats = NumberFormats("nvfp4-weights", "nvfp4")
    whole = estimated(formats=formats, decode_device=SECOND)
    packed = estimated(formats=formats, decode_device=SECOND, loaded_in=None)
    drawn = estimated(formats=formats, decode_device=SECOND, loaded_in=torch.float32)
    assert total(packed) < total(whole) < total(drawn)
    assert named(whole).keys() == {"transformer while loading", CONTEXT}
    assert named(whole)["transformer while loading"] > 10e9
    assert named(drawn)["transformer while loading"] == pytest.approx(20e9, rel=0.01)
    assert "transformer while loading" not in named(packed)
    assert "transformer while loading" not in named(estimated(formats=NumberFormats("fp8")))


def test_the_text_encoder_is_where_the_transformer_is() -> None:
    parts = estimated(decode_device=SECOND, text_encoder_bytes=11 * 10**9)
    assert named(parts)["text encoder"] == 11 * 10**9
    assert "text encoder" not in named(parts, SECOND)
    assert total(parts) == total(estimated(decode_device=SECOND)) + 11 * 10**9


def test_a_refusal_names_the_device_what_is_free_and_needed_its_parts_and_the_first_remedy(gpus) -> None:
    parts = estimated()
    gpus(total(parts) / 1e9 - 2)
    with pytest.raises(UserError) as error:
        check()
    said = str(error.value)
    needed = total(parts) / 1e9
    assert said.startswith(f"cuda:0 has {needed - 2:.1f} GB free, streaming needs about {needed:.1f} GB: ")
    for part in parts:
        assert f"{part.name} {part.bytes / 1e9:.1f}" in said
    listed = said.partition("GB: ")[2].partition(";")[0].split(", ")
    assert sum(float(part.rpartition(" ")[2]) for part in listed) == pytest.approx(needed, abs=0.05 * len(listed))
    packed = total(estimated(formats=NumberFormats("nvfp4-weights"))) / 1e9
    assert said.endswith(f"; with --precision nvfp4-weights it needs {packed:.1f} GB")
    assert "\n" not in said


def test_remedies_are_joined_where_one_is_not_enough(gpus) -> None:
    gpus(26.0)
    with pytest.raises(UserError, match=r"with --precision nvfp4-weights --kv-cache nvfp4 it needs 2\d\.\d GB$"):
        check()


def test_another_gpu_is_a_remedy(gpus) -> None:
    gpus(20.0, 40.0)
    formats = NumberFormats("nvfp4-weights", "nvfp4")
    with pytest.raises(UserError, match=r"with --decode-device cuda:1 it needs \S+ GB on cuda:0 and \S+ GB on cuda:1$"):
        check(formats=formats, loaded_in=None)


def test_where_nothing_fits_the_refusal_says_so(gpus) -> None:
    gpus(5.0)
    with pytest.raises(UserError, match="not even --precision nvfp4-weights --kv-cache nvfp4 makes it fit"):
        check()
    with pytest.raises(UserError, match="; use a GPU with more memory$"):
        check(formats=NumberFormats("nvfp4-weights", "nvfp4"))


def test_every_gpu_that_lacks_memory_is_named(gpus) -> None:
    gpus(5.0, 4.0)
    with pytest.raises(UserError, match=r"^cuda:0 has 5\.0 GB free.*; cuda:1 has 4\.0 GB free"):
        check(decode_device=SECOND)


def test_enough_memory_passes_and_only_the_gpus_in_use_are_asked(gpus) -> None:
    asked = gpus(80.0, 80.0)
    check(device=torch.device("cuda"), decode_device=torch.device("cuda"))
    assert set(asked) == {FIRST}


def test_a_cpu_is_not_asked(gpus) -> None:
    asked = gpus(0.0)
    check(device=CPU, decode_device=CPU)
    assert asked == []
    with pytest.raises(UserError, match="^cuda:0 has"):
        check(device=CPU, decode_device=FIRST)


def test_load_refuses_before_any_weight_is_read(model_folder: Path, gpus, monkeypatch) -> None:
    gpus(0.5)
    monkeypatch.setattr(pipeline, "pick_device", lambda device: FIRST)
    folder = ModelFolder.open(model_folder)
    for name in ("load_transformer", "load_vae", "load_text_encoder"):
        monkeypatch.setattr(ModelFolder, name, lambda *args, **kwargs: pytest.fail("a weight was read"))
    with pytest.raises(UserError, match=r"cuda:0 has 0\.5 GB free, streaming needs about 1\.\d GB: CUDA context 1\.0"):
        StreamingPipeline.load(folder)
