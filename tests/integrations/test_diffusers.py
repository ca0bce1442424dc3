"""The pipeline for diffusers: the frames of `StreamingPipeline`, diffusers' arguments, LoRA, saving, and errors."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from longvideo import Script, ShotRequest, StreamingPipeline, UserError
from longvideo.checkpoint import diffusers_json
from longvideo.checkpoint.adapters import Adapter
from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.names import to_official
from longvideo.checkpoint.settings import ModelSettings
from longvideo.infer.fit.placement import Placement
from longvideo.infer.fit.resident import resident_bytes
from longvideo.infer.loading import load_models
from longvideo.integrations import diffusers as integration
from longvideo.integrations.diffusers import CausalWanPipeline
from longvideo.integrations.diffusers_modules import model_folder
from longvideo.quantization.number_formats import NumberFormats
from longvideo.text.tokenizer import word_tokenizer
from tests.checkpoint import small
from tests.data.footage import square

PROMPT = "a red ball moves left"
FPS = 24
FIRST, CHUNK = 29, 32
PICTURE = np.full((64, 96, 3), (200, 30, 60), dtype=np.uint8)
CPU = Placement(torch.device("cpu"), torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.save(tmp_path_factory.mktemp("small") / "model").path


def load(folder: Path | str, **options: Any) -> CausalWanPipeline:
    pipe = CausalWanPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(folder: Path) -> CausalWanPipeline:
    return load(folder)


@pytest.fixture(scope="module")
def reference(folder: Path) -> StreamingPipeline:
    return StreamingPipeline.from_pretrained(folder, device="cpu", dtype=torch.float32)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def frames(pipe: CausalWanPipeline, prompt: Any = PROMPT, num_frames: int | None = 30, **options: Any) -> Any:
    """Generate with two steps and a seed, unless the options have others."""
    options = {"num_inference_steps": 2, "generator": seeded(), **options}
    return pipe(prompt, num_frames=num_frames, **options).frames  # pyright: ignore[reportAttributeAccessIssue]


def expected(reference: StreamingPipeline, seconds: float = 30 / FPS, **options: Any) -> np.ndarray:
    return np.concatenate(list(reference.stream(PROMPT, seconds=seconds, **{"steps": 2, **options})))


def as_bytes(values: np.ndarray) -> np.ndarray:
    whole = values * 255
    assert np.abs(whole - whole.round()).max() < 1e-3
    return whole.round().astype(np.uint8)


# frames


def test_tiny_gives_the_frames_of_the_streaming_pipeline_bit_for_bit() -> None:
    streaming = StreamingPipeline.from_pretrained("tiny", device="cpu", dtype=torch.float32, decoder="wan")
    prompt = "a small red circle drifts left over a black background"
    own = np.concatenate(list(streaming.stream(prompt, seconds=13 / FPS, steps=1, seed=5)))
    output = load("tiny")(prompt, num_frames=13, num_inference_steps=1, generator=seeded(5))
    assert isinstance(output, WanPipelineOutput)
    values = np.asarray(output.frames)
    assert values.shape == (1, 13, 128, 224, 3) and values.dtype == np.float32
    assert np.array_equal(values[0], own.astype(np.float32) / 255)


def test_every_output_type_has_the_same_frames(pipe: CausalWanPipeline, reference: StreamingPipeline) -> None:
    own = expected(reference)
    assert np.array_equal(as_bytes(frames(pipe)[0]), own)
    tensor = frames(pipe, output_type="pt")
    assert tensor.shape == (1, 30, 3, 64, 96)
    assert np.array_equal(as_bytes(tensor[0].permute(0, 2, 3, 1).numpy()), own)
    (pictures,) = frames(pipe, output_type="pil")
    assert isinstance(pictures[0], Image.Image) and np.array_equal(np.stack([np.asarray(one) for one in pictures]), own)
    (as_tuple,) = pipe(PROMPT, num_frames=30, num_inference_steps=2, generator=seeded(), return_dict=False)
    assert np.array_equal(as_bytes(as_tuple[0]), own)  # pyright: ignore[reportArgumentType, reportIndexIssue]


@pytest.mark.parametrize(("num_frames", "latent_frames"), [(1, 1), (2, 2), (29, 8), (30, 9), (61, 16)])
def test_latents_cover_the_frames_and_no_more(
    pipe: CausalWanPipeline, reference: StreamingPipeline, num_frames: int, latent_frames: int
) -> None:
    chunks = reference.stream_chunks(PROMPT, seconds=num_frames / FPS, steps=2)
    own = torch.cat([chunk.record.latents for chunk in chunks if chunk.is_complete], dim=2)
    latents = frames(pipe, num_frames=num_frames, output_type="latent")
    assert latents.shape[2] == latent_frames
    assert torch.equal(latents, own[:, :, :latent_frames])


def test_stream_yields_the_call_chunk_by_chunk(pipe: CausalWanPipeline) -> None:
    options: dict[str, Any] = {"num_inference_steps": 2, "generator": seeded()}
    parts = [np.asarray(part) for part in pipe.stream(PROMPT, num_frames=70, **options)]
    assert [part.shape[1] for part in parts] == [1, FIRST - 1, CHUNK, 70 - FIRST - CHUNK]
    assert np.array_equal(np.concatenate(parts, axis=1), frames(pipe, num_frames=70))


def test_a_number_of_frames_inside_a_chunk_only_drops_frames(pipe: CausalWanPipeline) -> None:
    whole = frames(pipe, num_frames=FIRST + CHUNK)
    assert whole.shape[1] == 61
    assert np.array_equal(frames(pipe, num_frames=40), whole[:, :40])


def test_a_script_has_its_own_length_and_shots(pipe: CausalWanPipeline, reference: StreamingPipeline) -> None:
    script = Script((ShotRequest("a red ball", 29 / FPS), ShotRequest("a blue ball", 32 / FPS)))
    own = np.concatenate(list(reference.stream(script, steps=2)))
    assert np.array_equal(as_bytes(frames(pipe, script, num_frames=None)[0]), own)
    with pytest.raises(UserError, match="leave num_frames out"):
        frames(pipe, script, num_frames=30)


def test_a_first_picture_is_the_one_of_the_streaming_pipeline(
    pipe: CausalWanPipeline, reference: StreamingPipeline
) -> None:
    assert np.array_equal(as_bytes(frames(pipe, image=PICTURE)[0]), expected(reference, image=PICTURE))


@pytest.mark.filterwarnings("ignore:the video comes back from the model's autoencoder")
@pytest.mark.parametrize("options", [{}, {"video_seconds": 1.5}])
def test_continued_footage_is_that_of_the_streaming_pipeline(
    pipe: CausalWanPipeline, reference: StreamingPipeline, options: dict[str, Any]
) -> None:
    options = {"video": square(90), **options}
    own = expected(reference, **options)
    assert np.array_equal(as_bytes(frames(pipe, **options)[0]), own) and not np.array_equal(own, expected(reference))
    parts = [np.asarray(part) for part in pipe.stream(PROMPT, num_frames=70, num_inference_steps=1, **options)]
    assert [part.shape[1] for part in parts] == [CHUNK, CHUNK, 70 - 2 * CHUNK]
    assert frames(pipe, num_frames=70, output_type="latent", **options).shape[2] == 2 * 8 + 2
    batch = frames(pipe, [PROMPT, PROMPT], generator=[seeded(), seeded(1)], **options)
    singles = np.concatenate([frames(pipe, generator=seeded(seed), **options) for seed in range(2)])
    assert np.abs(batch - singles).max() <= 2 / 255
    known = 2 if len(options) == 1 else 1
    noise = [torch.randn(1, 4, 8, 4, 6, generator=generator) for generator in [seeded()] * (known + 1)]
    assert np.array_equal(as_bytes(frames(pipe, latents=noise[-1], generator=seeded(9), **options)[0]), own)


# arguments


def test_the_videos_of_a_batch_are_those_of_single_calls(pipe: CausalWanPipeline) -> None:
    prompts = ["a red ball", "a blue ball"]
    batch = frames(pipe, prompts, generator=[seeded(1), seeded(2)], num_frames=20)
    for index, prompt in enumerate(prompts):
        single = frames(pipe, prompt, generator=seeded(index + 1), num_frames=20)
        assert np.abs(batch[index] - single[0]).max() <= 2 / 255
    copies = frames(pipe, prompts, num_videos_per_prompt=2, generator=[seeded(7)] + [seeded(1) for _ in range(3)])
    assert copies.shape[:2] == (4, 30)
    assert np.array_equal(copies[2], copies[3]) and not np.array_equal(copies[0], copies[1])


def test_noise_comes_from_the_generator_from_torchs_own_or_from_the_caller(pipe: CausalWanPipeline) -> None:
    drawn = frames(pipe)
    torch.manual_seed(0)
    assert np.array_equal(frames(pipe, generator=None), drawn)
    noise = torch.cat([torch.randn(1, 4, 8, 4, 6, generator=generator) for generator in [seeded()] * 2], dim=2)
    assert np.array_equal(frames(pipe, latents=noise, generator=seeded(9)), drawn)
    generator = seeded()
    frames(pipe, generator=generator)
    assert not torch.equal(generator.get_state(), seeded().get_state())


def test_a_negative_prompt_changes_its_own_video_alone(pipe: CausalWanPipeline, reference: StreamingPipeline) -> None:
    guided = {"guidance_scale": 3.0, "num_frames": 10}
    plain = frames(pipe, **guided)
    assert np.array_equal(as_bytes(plain[0]), expected(reference, 10 / FPS, guidance=3.0))
    assert np.array_equal(frames(pipe, negative_prompt="", **guided), plain)
    blue = frames(pipe, negative_prompt="blue", **guided)
    assert np.abs(blue - plain).max() > 0.1
    batch = frames(pipe, [PROMPT, PROMPT], negative_prompt=["", "blue"], **guided, generator=[seeded(), seeded()])
    assert np.abs(batch - np.concatenate([plain, blue])).max() <= 2 / 255


def test_guidance_is_used_above_one_as_in_diffusers(pipe: CausalWanPipeline) -> None:
    assert np.array_equal(frames(pipe, guidance_scale=0.0, num_frames=5), frames(pipe, num_frames=5))
    assert pipe.guidance_scale == 1.0


def test_sizes_can_be_chosen_for_a_call(pipe: CausalWanPipeline) -> None:
    with pytest.warns(UserWarning, match="the model was trained for 96x64; videos of 64x32 may look worse"):
        assert frames(pipe, height=32, width=64, num_frames=3).shape == (1, 3, 32, 64, 3)
    assert frames(pipe, num_frames=3).shape == (1, 3, 64, 96, 3)
    assert frames(pipe, max_sequence_length=16, num_frames=3).shape == (1, 3, 64, 96, 3)


def test_a_callback_sees_every_step_of_every_chunk_and_can_change_latents(pipe: CausalWanPipeline) -> None:
    seen: list[tuple[int, int, tuple[int, ...], int]] = []

    def watch(pipeline: CausalWanPipeline, step: int, timestep: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((step, timestep, tuple(tensors["latents"].shape), pipeline.num_timesteps))
        return tensors

    unchanged = frames(pipe, callback_on_step_end=watch, num_inference_steps=3)
    assert [step for step, *_ in seen] == list(range(6))
    assert seen[0][1] == seen[3][1] > seen[1][1] > seen[2][1] > 0
    assert {entry[2:] for entry in seen} == {((1, 4, 8, 4, 6), 6)}
    assert np.array_equal(unchanged, frames(pipe, num_inference_steps=3))

    def darken(_pipe: object, _step: int, _timestep: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": torch.zeros_like(tensors["latents"])}

    assert not frames(pipe, callback_on_step_end=darken, output_type="latent").any()


def test_an_interrupted_video_ends_after_its_chunk(pipe: CausalWanPipeline) -> None:
    def stop(pipeline: CausalWanPipeline, step: int, _timestep: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipeline._interrupt = step == 0
        return tensors

    short = frames(pipe, num_frames=29 + 32 * 4, callback_on_step_end=stop, num_inference_steps=1)
    assert np.array_equal(short, frames(pipe, num_frames=29, num_inference_steps=1)[:, : short.shape[1]])
    assert short.shape[1] == FIRST


def test_an_error_in_a_callback_reaches_the_caller(pipe: CausalWanPipeline) -> None:
    def fail(*_: object) -> dict[str, Tensor]:
        raise RuntimeError("out of ideas")

    with pytest.raises(RuntimeError, match="out of ideas"):
        frames(pipe, callback_on_step_end=fail)
    with pytest.raises(UserError, match="callback_on_step_end returned None; expected its dict"):
        frames(pipe, callback_on_step_end=lambda *_: None)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "prompt": ({"prompt": 3}, "prompt is 3; expected text, a list"),
    "empty prompt": ({"prompt": " "}, "the prompt is empty"),
    "no prompts": ({"prompt": []}, r"prompt is \[\]; expected"),
    "frames": ({"num_frames": 0}, "num_frames is 0; expected a whole number from 1"),
    "steps": ({"num_inference_steps": 0}, "num_inference_steps is 0; expected"),
    "guidance": ({"guidance_scale": "high"}, "guidance is 'high'; expected a number"),
    "output": ({"output_type": "gif"}, "output_type is 'gif'; expected one of np, pil, pt, latent"),
    "height": ({"height": 50}, "size is 96x50; expected multiples of 32, such as 96x32"),
    "large": ({"height": 640}, "size is 96x640, 60 tokens for each latent frame; the model was trained with 6"),
    "width": ({"width": 9.5}, "width is 9.5; expected a whole number from 1 to 16384"),
    "generators": ({"generator": [seeded()] * 3}, "there are 3 generators; expected one"),
    "generator": ({"generator": 5}, "generator is 5; expected a torch.Generator"),
    "negative": ({"negative_prompt": 5}, "negative_prompt is 5; expected text"),
    "negatives": ({"negative_prompt": ["", ""]}, "there are 2 negative prompts"),
    "negative without guidance": ({"negative_prompt": "blue"}, "guidance is 1; set guidance above 1"),
    "latents": (
        {"latents": torch.zeros(1, 4, 8, 4, 6)},
        r"latents are \[1, 4, 8, 4, 6\]; expected .*\[1, 4, 16, 4, 6\]",
    ),
    "picture and footage": ({"image": PICTURE, "video": square(90)}, "image and video exclude each other"),
    "seconds of no footage": ({"video_seconds": 2}, "video_seconds is 2, but there is no video"),
    "short footage": ({"video": square(28)}, "video has 28 frames at 24 per second"),
    "footage": ({"video": 7}, "video is 7; expected a name or a path"),
    "tensors": ({"callback_on_step_end_tensor_inputs": ["image"]}, "has 'image'; expected only 'latents'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_one_line_when_stream_is_called(pipe: CausalWanPipeline, case: str) -> None:
    options, message = WRONG[case]
    with pytest.raises(UserError, match=message) as error:
        pipe.stream(**{"prompt": PROMPT, "num_frames": 30, **options})
    assert "\n" not in str(error.value)


# loading, moving, saving


def test_components_are_those_of_diffusers(pipe: CausalWanPipeline, folder: Path) -> None:
    assert pipe.components.keys() == WanPipeline.from_pretrained(folder).components.keys()
    assert isinstance(pipe.transformer, WanTransformer3DModel) and isinstance(pipe.vae, AutoencoderKLWan)
    again = CausalWanPipeline(**pipe.components, settings=pipe.settings)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(frames(again), frames(pipe))
    with pytest.raises(UserError, match="these modules are unknown.*or pass settings"):
        CausalWanPipeline(**pipe.components)(PROMPT)


def test_weights_are_shared_and_the_streaming_pipeline_is_kept(pipe: CausalWanPipeline) -> None:
    streaming = pipe.streaming()
    assert pipe.streaming() is streaming
    ours = dict(streaming.models.transformer.named_parameters())
    theirs = {to_official(name): parameter for name, parameter in pipe.transformer.named_parameters()}
    shared = {name for name, tensor in ours.items() if tensor.data_ptr() == theirs[name].data_ptr()}
    copied = {name for name in ours if name not in shared}
    assert len(shared) > len(copied) and all(".self_attn." in name for name in copied)


@pytest.mark.parametrize("lora", [False, True])
def test_the_memory_check_counts_shared_weights_once(folder: Path, tmp_path: Path, lora: bool) -> None:
    pipe = load(folder)
    if lora:
        adapter(1.0).save(tmp_path / "lora", base="small")
        pipe.load_lora_weights(str(tmp_path / "lora"))
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder)
    frames(pipe, num_frames=1)
    models = pipe.streaming().models
    theirs = {tensor.data_ptr() for part in parts for tensor in part.state_dict().values()}
    autoencoder: Any = models.decoder._autoencoder  # pyright: ignore[reportAttributeAccessIssue]
    text_encoder: Any = models.text_encoder
    own = [tensor for part in (models.transformer, autoencoder, text_encoder.model) for tensor in part.parameters()]
    shared = sum(tensor.nbytes for tensor in own if tensor.data_ptr() in theirs)
    formats = NumberFormats(decoder="fp32")
    in_memory = model_folder(*parts, tokenizer=folder / "tokenizer", settings=pipe.settings)
    assert resident_bytes(in_memory, CPU, formats) == {CPU.device: shared} and shared > 0
    halved = replace(CPU, dtype=torch.bfloat16)
    assert resident_bytes(in_memory, halved, formats)[CPU.device] == sum(x.nbytes for x in autoencoder.parameters())
    assert resident_bytes(ModelFolder.open(folder), CPU, formats) == {}


def test_a_changed_weight_counts_from_the_next_call(folder: Path) -> None:
    pipe = load(folder)
    before = frames(pipe, num_frames=5)
    with torch.no_grad():
        pipe.transformer.blocks[0].attn2.to_v.weight.mul_(-1)
    assert not np.array_equal(frames(pipe, num_frames=5), before)


def test_offloaded_weights_are_refused(folder: Path) -> None:
    pipe = load(folder)
    pipe.vae.to("meta")
    with pytest.raises(UserError, match="the weights of the vae are offloaded; load the pipeline again"):
        pipe(PROMPT)


def test_the_data_types_are_those_of_the_modules(folder: Path) -> None:
    half = StreamingPipeline.from_pretrained(folder, device="cpu", dtype=torch.bfloat16)
    pipe = load(folder, torch_dtype=torch.bfloat16)
    own = expected(half, 5 / FPS)
    assert np.array_equal(as_bytes(frames(pipe, num_frames=5)[0]), own)
    pipe.to(torch.float32)
    formats, placement = pipe.streaming().formats, pipe.streaming().models.placement
    assert (formats.decoder, placement.dtype) == ("fp32", torch.float32)
    assert not np.array_equal(as_bytes(frames(pipe, num_frames=5)[0]), own)


def test_a_saved_pipeline_opens_here_and_in_diffusers(pipe: CausalWanPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    stored = ModelFolder.open(tmp_path / "saved")
    assert stored.settings == small.SETTINGS and stored.missing == ()
    streaming = StreamingPipeline(load_models(stored, CPU))
    assert np.array_equal(expected(streaming), as_bytes(frames(pipe)[0]))
    assert np.array_equal(frames(load(tmp_path / "saved")), frames(pipe))
    assert WanPipeline.from_pretrained(tmp_path / "saved").transformer.config.num_layers == 2


def test_parts_that_another_folder_stores_are_loaded_from_there() -> None:
    pipe = load("tiny-teacher")
    assert pipe.settings.guidance == 2.0
    assert frames(pipe, "a red circle", num_frames=1, num_inference_steps=1).shape == (1, 1, 128, 224, 3)


def diffusers_folder(path: Path) -> Path:
    """Write a small Wan model with random weights, by the classes of diffusers and transformers alone."""
    torch.manual_seed(0)
    config = diffusers_json.transformer_json(small.TRANSFORMER)
    transformer: Any = WanTransformer3DModel.from_config(config)
    vae: Any = AutoencoderKLWan.from_config(small.VAE.to_dict())
    tokenizer = word_tokenizer(small.WORDS)
    sizes = UMT5Config(vocab_size=tokenizer.get_vocab_size(), d_model=128, d_kv=32, num_heads=4, d_ff=256, num_layers=2)
    words: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    scheduler: Any = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    WanPipeline(words, UMT5EncoderModel(sizes), vae, scheduler, transformer, expand_timesteps=True).save_pretrained(
        path
    )
    return path


def test_a_folder_of_diffusers_has_the_settings_of_wan(tmp_path: Path) -> None:
    path = diffusers_folder(tmp_path / "wan")
    pipe = load(path)
    assert pipe.settings == ModelSettings()
    with pytest.warns(UserWarning, match="trained for 1280x704"):
        own = frames(pipe, height=64, width=96, num_frames=3)
    small_video = replace(ModelFolder.open(path), settings=ModelSettings(height=64, width=96))
    streaming = StreamingPipeline(load_models(small_video, CPU))
    assert np.array_equal(as_bytes(own[0]), expected(streaming, 3 / FPS))


def test_settings_can_be_given(folder: Path) -> None:
    pipe = load(folder, settings=replace(small.SETTINGS, chunk_frames=4, steps=1))
    parts = list(pipe.stream(PROMPT, num_frames=30))
    assert [np.asarray(part).shape[1] for part in parts] == [1, 12, 16, 1] and pipe.num_timesteps == 3


def test_diffusers_loads_it_as_a_custom_pipeline(
    folder: Path, pipe: CausalWanPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))
    file = str(Path(integration.__file__))
    custom: Any = diffusers.DiffusionPipeline.from_pretrained(str(folder), custom_pipeline=file, trust_remote_code=True)
    assert type(custom).__name__ == "CausalWanPipeline"
    custom.set_progress_bar_config(disable=True)
    assert np.array_equal(frames(custom), frames(pipe))


# LoRA


def adapter(scaling: float, seed: int = 0) -> Adapter:
    """Return a random LoRA of rank 2 for three layers."""
    generator = seeded(seed)
    layers = {"blocks.0.self_attn.q": (24, 24), "blocks.1.cross_attn.v": (24, 24), "blocks.1.ffn.0": (32, 24)}
    weights: dict[str, Tensor] = {}
    for name, (rows, columns) in layers.items():
        weights[f"{name}.lora_A"] = torch.randn(2, columns, generator=generator)
        weights[f"{name}.lora_B"] = torch.randn(rows, 2, generator=generator)
    return Adapter(weights, 2, scaling)


def with_update(folder: Path, *updates: tuple[float, Adapter]) -> CausalWanPipeline:
    """Return the pipeline with adapters added to the weights of its transformer by hand, each times a factor."""
    pipe = load(folder)
    for name, parameter in pipe.transformer.named_parameters():
        layer = to_official(name).removesuffix(".weight")
        for factor, one in updates:
            if layer in one.layers:
                change = one.weights[f"{layer}.lora_B"] @ one.weights[f"{layer}.lora_A"]
                parameter.data += factor * one.scaling * change
    return pipe


def test_a_lora_is_added_scaled_combined_and_unloaded(folder: Path, tmp_path: Path) -> None:
    first, second = adapter(0.5), adapter(0.25, seed=1)
    first.save(tmp_path / "first", base="small")
    second.save(tmp_path / "second", base="small")
    pipe = load(folder)
    plain = frames(pipe, num_frames=5)
    pipe.load_lora_weights(str(tmp_path / "first"), adapter_name="first")
    added = frames(pipe, num_frames=5)
    assert np.abs(added - plain).max() > 0.1
    assert np.abs(added - frames(with_update(folder, (1.0, first)), num_frames=5)).max() <= 1 / 255
    pipe.load_lora_weights(str(tmp_path / "second"), adapter_name="second")
    pipe.set_adapters(["first", "second"], [0.5, 2.0])
    both = frames(with_update(folder, (0.5, first), (2.0, second)), num_frames=5)
    assert np.abs(frames(pipe, num_frames=5) - both).max() <= 1 / 255
    pipe.fuse_lora(adapter_names=["first", "second"])
    assert np.abs(frames(pipe, num_frames=5) - both).max() <= 1 / 255
    pipe.unfuse_lora()
    pipe.disable_lora()
    assert np.abs(frames(pipe, num_frames=5) - plain).max() <= 1 / 255
    pipe.unload_lora_weights()
    assert np.abs(frames(pipe, num_frames=5) - plain).max() <= 1 / 255


def test_a_lora_folder_of_peft_is_loaded(folder: Path, tmp_path: Path) -> None:
    one = adapter(0.5)
    one.save(tmp_path / "lora", base="small")
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").unlink()
    pipe = load(folder)
    pipe.load_lora_weights(str(tmp_path / "lora"))
    assert pipe.get_list_adapters() == {"transformer": ["default_0"]}
    assert np.abs(frames(pipe, num_frames=5) - frames(with_update(folder, (1.0, one)), num_frames=5)).max() <= 1 / 255


# packages that may be missing

CORE_ALONE = """
import sys
sys.modules["transformers"] = sys.modules["peft"] = None  # as if they were not installed
from longvideo.errors import UserError
from longvideo.integrations.diffusers import CausalWanPipeline
for call in (CausalWanPipeline.from_pretrained, CausalWanPipeline.__new__(CausalWanPipeline).load_lora_weights):
    try:
        call("tiny")
    except UserError as error:
        print(error)
"""


def test_a_missing_package_is_one_line_that_names_the_extra() -> None:
    result = subprocess.run([sys.executable, "-c", CORE_ALONE], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [
        "CausalWanPipeline.from_pretrained needs the package transformers; run: pip install 'longvideo[diffusers]'",
        "load_lora_weights needs the package peft; run: pip install 'longvideo[diffusers]'",
    ]
