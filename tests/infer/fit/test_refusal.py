"""The refusal where a GPU has less free memory than streaming needs, and the remedy in its message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from longvideo.checkpoint.folder import ModelFolder
from longvideo.errors import UserError
from longvideo.infer.fit import placement, refusal
from longvideo.infer.fit.memory import decoding_parts, estimate
from longvideo.infer.fit.placement import Placement
from longvideo.infer.fit.refusal import assess, check_decoding_memory, check_memory
from longvideo.infer.loading import load_models
from longvideo.kernels.backends import Backend
from longvideo.quantization.number_formats import PACKED_CACHES, NumberFormats
from longvideo.streaming.decoder_convolutions import Grid
from tests.infer.workloads import CPU, FIRST, SECOND, SetFree, shapes, total, workload


def check(**changes: Any) -> None:
    check_memory(workload(**changes))


def test_decoding_alone_needs_less_and_is_refused_on_a_small_gpu(gpus: SetFree) -> None:
    autoencoder, placed = shapes().autoencoder, Placement(FIRST, FIRST)
    parts = decoding_parts(autoencoder, "bf16", placed, Grid(1, 8, 44, 80))
    whole = {part.name: part.bytes for part in estimate(workload())}
    assert {part.name for part in parts} < whole.keys() and total(parts) < total(estimate(workload()))
    needed = total(parts) / 1e9
    gpus(needed + 0.1)
    check_decoding_memory(parts)
    gpus(needed - 0.2)
    message = rf"^cuda:0 has {needed - 0.2:.1f} GB free; decoding needs about {needed:.1f} GB: .*; use another --device"
    with pytest.raises(UserError, match=message):
        check_decoding_memory(parts)
    gpus()  # of another machine
    check_decoding_memory(parts)


def test_a_refusal_names_the_device_what_is_free_and_needed_its_parts_and_the_first_remedy(gpus: SetFree) -> None:
    parts = estimate(workload())
    gpus(total(parts) / 1e9 - 2)
    with pytest.raises(UserError) as error:
        check()
    message = str(error.value)
    needed = total(parts) / 1e9
    assert message.startswith(f"cuda:0 has {needed - 2:.1f} GB free; streaming needs about {needed:.1f} GB: ")
    for part in parts:
        assert f"{part.name} {part.bytes / 1e9:.1f}" in message
    listed = message.partition("GB: ")[2].partition(";")[0].split(", ")
    assert sum(float(part.rpartition(" ")[2]) for part in listed) == pytest.approx(needed, abs=0.05 * len(listed))
    low = total(estimate(workload(low_memory=True))) / 1e9
    price = "--low-memory makes denoising and decoding take turns"
    assert message.endswith(f"; with --low-memory it needs {low:.1f} GB ({price})")
    assert "\n" not in message


def test_weights_that_are_on_the_gpu_already_are_needed_once(gpus: SetFree) -> None:
    loaded = 4 * 10**9
    needed = total(estimate(workload(resident={FIRST: loaded})))
    assert needed == total(estimate(workload())) - loaded
    gpus(needed / 1e9 + 0.1)
    check(resident={FIRST: loaded})
    with pytest.raises(UserError, match="streaming needs about"):
        check()
    gpus(needed / 1e9 - 0.2)
    with pytest.raises(UserError, match=r"loaded before -4\.0"):
        check(resident={FIRST: loaded})


def test_the_fastest_options_that_are_enough_are_joined(gpus: SetFree) -> None:
    gpus(27.0)
    with pytest.raises(UserError, match=r"with --low-memory --kv-cache nvfp4 it needs 2\d\.\d GB \("):
        check()
    gpus(22.0)
    with pytest.raises(UserError, match=r"with --low-memory --kv-cache nvfp4 --precision nvfp4-weights it needs"):
        check()
    gpus(17.5)
    with pytest.raises(UserError) as error:
        check()
    message = str(error.value)
    assert "with --low-memory --kv-cache nvfp4 --precision nvfp4-weights --offload-weights it needs 17." in message
    assert message.endswith("--offload-weights copies the transformer to the GPU in each step)")


def test_what_changes_no_result_comes_before_fewer_bits(gpus: SetFree) -> None:
    gpus(total(estimate(workload(low_memory=True))) / 1e9)
    with pytest.raises(UserError, match="; with --low-memory it needs"):
        check()


@pytest.mark.parametrize(("free", "options"), [(32.0, ""), (27.0, " --precision fp8")])
def test_fp8_is_proposed_where_the_gpu_has_it(
    gpus: SetFree, monkeypatch: pytest.MonkeyPatch, free: float, options: str
) -> None:
    gpus(free)
    for function in ("product_backend", "convolution_backend"):
        monkeypatch.setattr(refusal, function, lambda _name, _device: Backend("FP8 units"))
    with pytest.raises(UserError, match=f"; with --low-memory --decoder-precision fp8{options} it needs"):
        check()


def test_four_bits_alone_are_a_remedy_of_a_mixed_cache(gpus: SetFree) -> None:
    packed, mixed = (
        total(
            estimate(
                workload(formats=NumberFormats("nvfp4-weights", kv_cache), shapes=shapes(packed=True), low_memory=True)
            )
        )
        / 1e9
        for kv_cache in PACKED_CACHES
    )
    gpus(mixed - 1)
    with pytest.raises(UserError, match=rf"with --kv-cache nvfp4 it needs {packed:.1f} GB \("):
        check(formats=NumberFormats("nvfp4-weights", "nvfp4-mixed"), shapes=shapes(packed=True), low_memory=True)


def test_another_gpu_is_a_remedy(gpus: SetFree) -> None:
    gpus(19.5, 40.0)
    formats = NumberFormats("nvfp4-weights", "nvfp4")
    with pytest.raises(
        UserError, match=r"with --decode-device cuda:1 it needs \S+ GB on cuda:0 and \S+ GB on cuda:1 \("
    ):
        check(formats=formats, shapes=shapes(packed=True))


def test_the_other_gpu_alone_is_a_remedy(gpus: SetFree) -> None:
    gpus(5.0, 60.0)
    with pytest.raises(
        UserError, match=rf"with --device cuda:1 it needs {total(estimate(workload())) / 1e9:.1f} GB \("
    ):
        check()


def test_where_no_option_helps_the_refusal_states_it(gpus: SetFree) -> None:
    gpus(5.0)
    options = "--low-memory --kv-cache nvfp4 --precision nvfp4-weights --offload-weights"
    with pytest.raises(UserError, match=f"it does not fit with {options} either; use a small --decoder or a GPU with"):
        check()
    smallest = {"low_memory": True, "offload_weights": True, "shapes": shapes().with_decoder("taew2_2")}
    with pytest.raises(UserError, match="[0-9]; use a GPU with more memory$"):
        check(formats=NumberFormats("nvfp4-weights", "nvfp4"), **smallest)


def test_every_gpu_with_too_little_memory_is_named(gpus: SetFree) -> None:
    gpus(5.0, 4.0)
    with pytest.raises(UserError, match=r"^cuda:0 has 5\.0 GB free.*; cuda:1 has 4\.0 GB free"):
        check(decode_device=SECOND)


def test_enough_memory_passes_and_only_the_free_memory_of_gpus_in_use_is_read(gpus: SetFree) -> None:
    devices = gpus(80.0, 80.0)
    check(device=torch.device("cuda"), decode_device=torch.device("cuda"))
    assert set(devices) == {FIRST}


def test_the_free_memory_of_a_cpu_is_not_read(gpus: SetFree) -> None:
    devices = gpus(0.0)
    check(device=CPU, decode_device=CPU)
    assert devices == []
    with pytest.raises(UserError, match="^cuda:0 has"):
        check(device=CPU, decode_device=FIRST)


def test_a_gpu_that_does_not_exist_is_estimated_and_is_never_insufficient(gpus: SetFree) -> None:
    devices = gpus()
    fit = assess(workload(decode_device=SECOND))
    assert fit.needed == {device: total(estimate(workload(decode_device=SECOND)), device) for device in (FIRST, SECOND)}
    assert (fit.free, fit.insufficient, fit.remedy, devices) == ({}, [], None, [])


def test_a_gpu_that_does_not_answer_is_an_error_of_one_line(gpus: SetFree, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(80.0)

    def mem_get_info(_device: torch.device) -> tuple[int, int]:
        raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    with pytest.raises(
        UserError, match=r"^the free memory of cuda:0 is unknown \(CUDA error: out of memory\); use another"
    ):
        check()


def test_load_refuses_before_any_weight_is_read(
    model_folder: Path, gpus: SetFree, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(0.5)
    monkeypatch.setattr(placement, "pick_device", lambda _device: FIRST)
    folder = ModelFolder.open(model_folder)
    for name in ("load_transformer", "load_vae", "load_text_encoder"):
        monkeypatch.setattr(ModelFolder, name, lambda *_arguments, **_options: pytest.fail("a weight was read"))
    with pytest.raises(UserError, match=r"cuda:0 has 0\.5 GB free; streaming needs about 1\.\d GB: CUDA context 1\.0"):
        load_models(folder, placement.Placement.choose())
