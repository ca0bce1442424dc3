"""The pipeline on a small random model: frames, seeds, batches, pictures, prompts, and what it refuses."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from longvideo.checkpoint.conversion import ConversionOptions, convert_model
from longvideo.checkpoint.folder import ModelFolder
from longvideo.errors import CheckpointError, UserError
from longvideo.infer import generation
from longvideo.infer.decode import ChunkDecoder
from longvideo.infer.pipeline import Script, ShotRequest, StreamingPipeline
from tests.infer.small import HEIGHT, WIDTH

PROMPTS = ["a red ball bounces", "a blue square spins"]


def video(pipeline: StreamingPipeline, prompts: str | Sequence[str] | Script, **options: Any) -> np.ndarray:
    return np.concatenate(list(pipeline.stream(prompts, **options)))


@contextmanager
def torch_threads(count: int) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_chunks_have_the_requested_frames(pipeline: StreamingPipeline) -> None:
    chunks = list(pipeline.stream(PROMPTS, seconds=4))
    assert [len(chunk) for chunk in chunks] == [1, 28, 32, 32, 3]
    assert all(chunk.dtype == np.uint8 and chunk.shape[1:] == (HEIGHT, WIDTH, 3) for chunk in chunks)
    assert pipeline.plan(PROMPTS, seconds=4).num_chunks == 4


def test_a_shorter_video_is_the_beginning_of_a_longer_one(pipeline: StreamingPipeline) -> None:
    longer = video(pipeline, PROMPTS[0], seconds=3)
    for seconds in (1 / 24, 0.5, 1.5):
        assert np.array_equal(video(pipeline, PROMPTS[0], seconds=seconds), longer[: round(seconds * 24)])


def test_same_seed_same_bits_and_another_seed_another_video(pipeline: StreamingPipeline) -> None:
    first, again, other = (video(pipeline, PROMPTS, seconds=3, seed=seed) for seed in (7, 7, 8))
    assert np.array_equal(first, again)
    assert np.abs(first.astype(int) - other).mean() > 1


def test_seeds_and_counts_of_numpy_are_numbers(pipeline: StreamingPipeline) -> None:
    expected = video(pipeline, PROMPTS[0], seconds=1, seed=7, steps=2, guidance=2.0)
    for kind in (np.int64, np.uint8):
        options = {"seed": kind(7), "steps": kind(2), "guidance": np.float32(2), "seconds": kind(1)}
        assert np.array_equal(video(pipeline, PROMPTS[0], **options), expected)
    seeds: list[Any] = [np.int64(7)]
    batch = pipeline.generate_batch([PROMPTS[:1]], seconds=[1], seeds=seeds, steps=2, guidance=2.0)
    assert np.abs(batch[0].astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": 7}, "the model is 7; expected a name or a path"),
        ({"base": 7}, "base is 7; expected a name or a path"),
        ({"device": "tpu"}, "'tpu' is not a device"),
        ({"device": 0}, "device is 0; use cpu, cuda or cuda:N"),
        ({"device": "cpu:x"}, "'cpu:x' is not a device"),
        ({"decode_device": "cuda:97"}, "device 'cuda:97' does not exist"),
        ({"decode_share": "a"}, "decode_share is 'a'; expected a number"),
        ({"decode_share": 0.5}, "cpu both denoises and decodes"),
        ({"dtype": "bf16"}, "dtype is 'bf16'; expected one of torch.float32, torch.bfloat16"),
        ({"dtype": torch.int8}, "dtype is torch.int8; expected one of"),
        ({"precision": "int8"}, "precision is 'int8'; expected one of"),
        ({"precision": 4}, "precision is 4; expected one of"),
        ({"precision": "fp8"}, "FP8 products need a GPU"),
        ({"kv_cache": None}, "kv_cache is None; expected one of bf16, nvfp4, nvfp4-mixed"),
        ({"attention": "fp8"}, "FP8 attention needs a CUDA GPU"),
        ({"preset": "none"}, "preset 'none'|'none'"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_opened(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_arguments: Any, **_options: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(ModelFolder, "load_transformer", load)
    with pytest.raises(UserError, match=message):
        StreamingPipeline.from_pretrained(**{"name": "tiny", "device": "cpu", **options})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: pipe.session(7), "the prompt is 7; expected text"),
        (lambda pipe: pipe.session("a", history_chunks=-1), "history_chunks is -1; expected a whole number from 0"),
        (lambda pipe: pipe.session("a", history_chunks="4"), "history_chunks is '4'; expected a whole number"),
        (lambda pipe: pipe.session("a", seconds="4"), "the video: seconds is '4'"),
        (lambda pipe: pipe.session("a", seed=True), "seed is True"),
        (lambda pipe: pipe.session("a").set_prompt("a \ud83d"), "the prompt is not valid text"),
        (lambda pipe: pipe.session("a").set_prompt("a", mode=None), "mode is None; expected one of"),
        (lambda pipe: pipe.session("a").add_shot("a", chunk="3"), "chunk is '3'; expected a whole number"),
        (lambda pipe: pipe.session("a").seek(None), "chunk is None; expected a whole number"),
        (lambda pipe: pipe.session("a").snapshot(7), "the snapshot is 7; expected a name or a path"),
        (lambda pipe: pipe.restore(None), "the snapshot is None; expected a name or a path"),
        (
            lambda pipe: pipe.generate_batch("a ball", seconds=[1], seeds=[1]),
            "prompts is 'a ball'; expected a sequence",
        ),
        (
            lambda pipe: pipe.generate_batch(["a ball"], seconds=[1], seeds=[1]),
            r"prompts\[0\] is 'a ball'; expected a seq",
        ),
        (lambda pipe: pipe.generate_batch([["a ball"]], seconds=1, seeds=[1]), "seconds is 1; expected a sequence"),
        (lambda pipe: pipe.generate_batch([["a ball"]], seconds=[1], seeds=[True]), "seed is True"),
        (
            lambda pipe: pipe.generate_batch([["a ball"]], seconds=[1], seeds=np.array(1)),
            "seeds is array.1.; expected a sequence",
        ),
        (lambda pipe: pipe.session("a").snapshot("a" * 300), "its name has more than"),
        (lambda pipe: pipe.session("a").snapshot("a\0"), r"the snapshot is 'a.x00'; expected a name or a path"),
        (lambda pipe: pipe.restore("a" * 5000), "cannot read the snapshot a*: file name too long"),
        (lambda pipe: pipe.stream("a", seconds=1, image="a" * 5000), "cannot read the image a*: file name too long"),
    ],
)
def test_wrong_values_of_other_calls_are_refused(
    call: Callable[[StreamingPipeline], object], message: str, pipeline: StreamingPipeline
) -> None:
    with pytest.raises(UserError, match=message):
        call(pipeline)


def test_the_streamed_video_equals_latents_decoded_at_once(
    pipeline: StreamingPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = []
    rollout = generation.rollout

    def recording(*arguments: Any, **options: Any) -> Iterator[Tensor]:
        for chunk in rollout(*arguments, **options):
            latents.append(chunk)
            yield chunk

    monkeypatch.setattr(generation, "rollout", recording)
    streamed = video(pipeline, PROMPTS[0], seconds=93 / 24)
    expected = pipeline.models.decoder.plain(torch.cat(latents, dim=2))[0].numpy()
    assert np.abs(streamed.astype(int) - expected).max() <= 1 and (streamed != expected).mean() < 1e-3


def test_a_batch_holds_what_each_video_is_alone(pipeline: StreamingPipeline) -> None:
    scripts = [PROMPTS, PROMPTS[::-1]]
    batch = pipeline.generate_batch(scripts, seconds=[2, 2], seeds=[3, 4], guidance=2.0)
    assert batch.shape == (2, 96, HEIGHT, WIDTH, 3) and batch.dtype == np.uint8
    for row, (prompts, seed) in enumerate(zip(scripts, (3, 4), strict=True)):
        alone = video(pipeline, prompts, seconds=4, seed=seed, guidance=2.0)
        assert np.abs(alone.astype(int) - batch[row]).max() <= 1


def test_prompt_guidance_and_steps_change_the_video(pipeline: StreamingPipeline) -> None:
    base = video(pipeline, PROMPTS[0], seconds=1)
    for prompt, options in ((PROMPTS[1], {}), (PROMPTS[0], {"guidance": 3.0}), (PROMPTS[0], {"steps": 4})):
        assert not np.array_equal(video(pipeline, prompt, seconds=1, **options), base)


def test_the_second_shot_does_not_change_the_first(pipeline: StreamingPipeline) -> None:
    one, two = video(pipeline, PROMPTS[0], seconds=4), video(pipeline, PROMPTS, seconds=4)
    changed = np.flatnonzero((one != two).any(axis=(1, 2, 3)))
    assert changed[0] in range(61, 66)  # requested at frame 48; the nearest boundary is 61


def test_a_given_picture_is_the_first_frame(pipeline: StreamingPipeline, model_folder: Path, tmp_path: Path) -> None:
    pixels = np.zeros((HEIGHT * 3, WIDTH * 2, 3), np.uint8)
    pixels[..., 0], pixels[:, WIDTH:, 1] = 200, 90
    Image.fromarray(pixels).save(tmp_path / "first.png")
    frames = video(pipeline, PROMPTS[0], seconds=1, image=tmp_path / "first.png")
    crop = Image.fromarray(pixels).crop((0, HEIGHT, WIDTH * 2, HEIGHT * 2)).resize((WIDTH, HEIGHT))
    autoencoder = ModelFolder.open(model_folder).load_vae(dtype=torch.float32)
    with torch.no_grad():
        picture = torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
        moments, _ = autoencoder.encode(picture)
        decoded, _ = autoencoder.decode(moments[:, : moments.shape[1] // 2])
    expected = (decoded[0, :, 0].clamp(-1, 1) + 1) * 127.5
    difference = np.abs(frames[0] - expected.permute(1, 2, 0).numpy())
    assert np.median(difference) < 1 and difference.mean() < 2  # the resampling filters differ at the one edge
    assert not np.array_equal(frames, video(pipeline, PROMPTS[0], seconds=1))
    for image in (pixels, torch.from_numpy(pixels), Image.fromarray(pixels), str(tmp_path / "first.png")):
        assert np.array_equal(video(pipeline, PROMPTS[0], seconds=1, image=image), frames)
    batch = pipeline.generate_batch([PROMPTS[:1], PROMPTS[1:2]], seconds=[1], seeds=[0, 1], image=pixels)
    others = video(pipeline, PROMPTS[1], seconds=1, seed=1, image=pixels)
    assert np.abs(batch.astype(int) - np.stack([frames, others])).max() <= 1


def test_unknown_words_are_named_in_a_warning(pipeline: StreamingPipeline) -> None:
    with pytest.warns(UserWarning, match="does not contain 'zebra', 'gallops'"):
        pipeline.stream(["a red zebra", "a zebra gallops"], seconds=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline.stream("a red ball, at night.", seconds=4)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("", {"seconds": 4}, "prompt is empty"),
        ([], {"seconds": 4}, "there is no prompt"),
        (["a", " "], {"seconds": 4}, "prompt 2 is empty"),
        ("a", {}, "seconds is missing"),
        ("a", {"seconds": 0}, "the video: seconds is 0;"),
        ("a", {"seconds": -2}, "the video: seconds is -2;"),
        ("a", {"seconds": 1e7}, "at most 86400"),
        ("a", {"seconds": 4, "steps": 0}, "steps is 0"),
        ("a", {"seconds": 4, "steps": 1001}, "steps is 1001"),
        ("a", {"seconds": 4, "guidance": -1}, "guidance is -1"),
        ("a", {"seconds": 4, "guidance": float("nan")}, "guidance is nan"),
        ("a", {"seconds": 4, "seed": -1}, "seed is -1"),
        ("a", {"seconds": 4, "seed": True}, "seed is True; expected a whole number"),
        ("a", {"seconds": 4, "seed": 1.0}, "seed is 1.0; expected a whole number"),
        ("a", {"seconds": 4, "seed": np.uint64(2**63)}, "seed is 9223372036854775808; expected a whole number from 0"),
        ("a", {"seconds": 4, "seed": np.int32(-1)}, "seed is -1; expected a whole number from 0"),
        ("a", {"seconds": 4, "seed": None}, "seed is None; expected a whole number"),
        ("a", {"seconds": 4, "steps": 2.5}, "steps is 2.5; expected a whole number"),
        ("a", {"seconds": 4, "steps": "4"}, "steps is '4'; expected a whole number"),
        ("a", {"seconds": 4, "guidance": "1"}, "guidance is '1'; expected a number"),
        ("a", {"seconds": 4, "guidance": True}, "guidance is True; expected a number"),
        ("a", {"seconds": 4, "guidance": 10**400}, "guidance is a number of [0-9]* bits"),
        ("a", {"seconds": "4"}, "the video: seconds is '4'; expected a number"),
        (7, {"seconds": 4}, "prompts is 7; expected a text"),
        (["a", None], {"seconds": 4}, "prompt 2 is None; expected text"),
        ("a \ud83d", {"seconds": 4}, "the prompt is not valid text"),
        ("a", {"seconds": 4, "image": "nothing.png"}, "there is no image nothing.png"),
        ("a", {"seconds": 4, "image": torch.zeros(3, 3, 3)}, "image is torch.float32"),
        ("a", {"seconds": 4, "image": 7}, "image is of type int"),
        (["a", "a", "a"], {"seconds": 2}, "use 1.33 s or more for every shot"),
        (Script((ShotRequest("a", 3.0),)), {"seconds": 4}, "leave seconds out"),
    ],
)
def test_wrong_values_are_refused_when_called_not_when_iterated(
    pipeline: StreamingPipeline, prompts: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pipeline.stream(prompts, **options)


def test_a_file_and_its_base_make_the_video_of_the_folder(model_folder: Path, tmp_path: Path) -> None:
    convert_model(ModelFolder.open(model_folder), tmp_path / "model.pt", ConversionOptions("longlive"))
    whole, put_together = (
        StreamingPipeline.from_pretrained(name, base=base, device="cpu", decoder_precision="fp32")
        for name, base in ((model_folder, None), (tmp_path / "model.pt", model_folder))
    )
    options = {"seconds": 1.0, "seed": 2}
    assert np.array_equal(video(put_together, PROMPTS[0], **options), video(whole, PROMPTS[0], **options))
    with pytest.raises(CheckpointError, match="number of heads is unknown; use --base with a model folder"):
        StreamingPipeline.from_pretrained(tmp_path / "model.pt", device="cpu")


def test_wrong_batches_devices_and_names_are_refused(pipeline: StreamingPipeline, model_folder: Path) -> None:
    with pytest.raises(UserError, match="one seed for each video"):
        pipeline.generate_batch([PROMPTS], seconds=[2, 2], seeds=[1, 2])
    with pytest.raises(UserError, match="every video needs 1 prompts"):
        pipeline.generate_batch([PROMPTS], seconds=[2], seeds=[1])
    with pytest.raises(UserError, match="'tpu' is not a device"):
        StreamingPipeline.from_pretrained(model_folder, device="tpu")
    with pytest.raises(UserError, match="device 'cuda:97' does not exist"):
        StreamingPipeline.from_pretrained(model_folder, device="cuda:97")
    with pytest.raises(CheckpointError, match="no model 'tinny'.*did you mean 'tiny'"):
        StreamingPipeline.from_pretrained("tinny")


def test_a_decoder_error_is_raised_to_the_caller(pipeline: StreamingPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def failing(_decoder: ChunkDecoder, _latents: Tensor, num_frames: int, **_options: Any) -> None:
        calls.append(num_frames)
        raise RuntimeError("decoder broke")

    monkeypatch.setattr(ChunkDecoder, "launch", failing)
    running = threading.active_count()
    for threads in (1, 2):
        with torch_threads(threads), pytest.raises(RuntimeError, match="decoder broke"):
            next(pipeline.stream(PROMPTS[0], seconds=600))
    assert len(calls) == 2 and threading.active_count() == running


def test_threads_change_no_bit_and_end_with_the_stream(pipeline: StreamingPipeline) -> None:
    running = threading.active_count()
    with torch_threads(1):
        in_turn = video(pipeline, PROMPTS, seconds=4)
    with torch_threads(2):
        assert np.array_equal(video(pipeline, PROMPTS, seconds=4), in_turn)
        stream = pipeline.stream(PROMPTS[0], seconds=600)
        assert np.array_equal(next(stream), in_turn[:1])
        assert np.array_equal(next(stream), in_turn[1:29])
        assert threading.active_count() == running + 2
        stream.close()
        assert threading.active_count() == running and torch.get_num_threads() == 2


@pytest.mark.gpu
def test_a_stream_on_cuda_shows_what_the_cpu_shows(pipeline: StreamingPipeline, model_folder: Path) -> None:
    on_gpu = StreamingPipeline.from_pretrained(model_folder, device="cuda", dtype=torch.float32)
    expected, frames = (video(pipe, PROMPTS, seconds=8, guidance=2.0).astype(int) for pipe in (pipeline, on_gpu))
    assert np.abs(frames - expected).mean() < 1
    assert np.array_equal(frames, video(on_gpu, PROMPTS, seconds=8, guidance=2.0))


@pytest.mark.multigpu
def test_decoding_on_a_second_gpu_changes_no_bit(model_folder: Path) -> None:
    one, two = (
        StreamingPipeline.from_pretrained(model_folder, device="cuda:0", decode_device=decode)
        for decode in ("cuda:0", "cuda:1")
    )
    assert np.array_equal(video(one, PROMPTS, seconds=20), video(two, PROMPTS, seconds=20))
