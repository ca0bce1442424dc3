"""Videos that continue footage: what is read of it, and that it is the past of the video."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longvideo.checkpoint.folder import ModelFolder
from longvideo.data.clips import ClipSpec, plan_clips, read_clip
from longvideo.data.encoding import encode_clip
from longvideo.errors import CheckpointError, UserError
from longvideo.infer.beginning import BeginningChoice
from longvideo.infer.encode import FrameEncoder
from longvideo.infer.footage import FootageReader
from longvideo.infer.generation import GeneratedChunk
from longvideo.infer.pipeline import Script, ShotRequest, StreamingPipeline
from longvideo.infer.script import ChunkTiming
from longvideo.model.chunk_frames import WAN_CHUNKS
from tests.data import clock
from tests.data.footage import square, write
from tests.infer import small
from tests.infer.small import HEIGHT, WIDTH
from tests.infer.test_pipeline import torch_threads, video

PROMPT, OTHER = "a red ball bounces", "a blue square spins at night"
ONE_CHUNK, TWO_CHUNKS = 29, 61
READER = FootageReader(ChunkTiming(ONE_CHUNK, 32, 24), 2, (clock.HEIGHT, clock.WIDTH))

pytestmark = pytest.mark.filterwarnings("ignore:the video comes back from the model's autoencoder")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with torch_threads(1):
        yield


@pytest.fixture(scope="module")
def footage() -> Tensor:
    return square(90)


class KnownLatents(FrameEncoder):
    """An encoder of frames whose latents are known, because no autoencoder is exact."""

    def __init__(self, latents: Tensor) -> None:
        super().__init__(load=lambda: pytest.fail("the latents are known"))
        self.latents = latents

    def encode(self, frames_THWC: Tensor) -> Tensor:
        assert len(frames_THWC) == 4 * self.latents.shape[2] - 3
        return self.latents


def latents_of(chunks: Iterable[GeneratedChunk]) -> dict[int, Tensor]:
    return {chunk.step.index: chunk.record.latents for chunk in chunks}


@pytest.mark.parametrize("known", [1, 2])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_continued_video_equals_the_uninterrupted_one(
    pipeline: StreamingPipeline, known: int, guidance: float
) -> None:
    options: dict[str, Any] = {"seed": 3, "guidance": guidance}
    expected = list(pipeline.stream_chunks(PROMPT, seconds=(ONE_CHUNK + 4 * 32) / 24, **options))
    latents, frames = latents_of(expected), np.concatenate([chunk.frames[0] for chunk in expected])
    context = torch.cat([latents[index] for index in range(known)], dim=2)
    count = ONE_CHUNK + 32 * (known - 1)
    knowing = StreamingPipeline(replace(pipeline.models, encoder=KnownLatents(context)))
    result = list(knowing.stream_chunks(PROMPT, seconds=(5 - known) * 32 / 24, video=frames[:count], **options))
    assert [chunk.step.index for chunk in result] == list(range(known, 5))
    for index, values in latents_of(result).items():
        torch.testing.assert_close(values, latents[index], rtol=0, atol=2e-5)
    continued = np.concatenate([chunk.frames[0] for chunk in result])
    assert np.abs(continued.astype(int) - frames[count:]).max() <= 1


def test_shots_after_footage_begin_where_their_seconds_are(pipeline: StreamingPipeline, footage: Tensor) -> None:
    script = Script((ShotRequest(PROMPT, 32 / 24), ShotRequest(OTHER, 70 / 24)))
    steps = [chunk.step for chunk in pipeline.stream_chunks(script, video=footage)]
    assert [step.index for step in steps] == [2, 3, 4, 5]
    assert [step.num_frames for step in steps] == [32, 32, 32, 6]
    assert [step.cut for step in steps] == [False, True, False, False]
    assert pipeline.plan(script, continues=True).num_chunks == 4


def test_footage_prompt_and_seed_change_the_video(pipeline: StreamingPipeline, footage: Tensor) -> None:
    base = video(pipeline, PROMPT, seconds=1, video=footage)
    assert np.array_equal(video(pipeline, PROMPT, seconds=1, video=footage.numpy()), base)
    assert np.array_equal(video(pipeline, PROMPT, seconds=1, video=footage[-TWO_CHUNKS:]), base)
    for prompt, options in (
        (PROMPT, {"video": footage.flip(0)}),
        (PROMPT, {"video": footage, "video_seconds": 2}),
        (PROMPT, {"video": footage, "seed": 1}),
        (OTHER, {"video": footage}),
    ):
        assert not np.array_equal(video(pipeline, prompt, seconds=1, **options), base)


@pytest.mark.parametrize("options", [{}, {"video_seconds": 1.5, "guidance": 2.0}])
def test_a_batch_continues_footage_as_each_video_alone(
    pipeline: StreamingPipeline, footage: Tensor, options: dict[str, Any]
) -> None:
    scripts = [[PROMPT, OTHER], [OTHER, PROMPT]]
    batch = pipeline.generate_batch(scripts, seconds=[2, 2], seeds=[3, 4], video=footage, **options)
    for row, (prompts, seed) in enumerate(zip(scripts, (3, 4), strict=True)):
        alone = video(pipeline, prompts, seconds=4, seed=seed, video=footage, **options)
        assert alone.shape == batch[row].shape and np.abs(alone.astype(int) - batch[row]).max() <= 1


def test_the_decoder_continues_after_the_footage(pipeline: StreamingPipeline, footage: Tensor) -> None:
    chunks = list(pipeline.stream_chunks(PROMPT, seconds=2, video=footage))
    context = BeginningChoice(video=footage).encode(pipeline.models).footage
    whole = torch.cat([*context, *latents_of(chunks).values()], dim=2)
    expected = pipeline.models.decoder.plain(whole)[0, TWO_CHUNKS : TWO_CHUNKS + 48].numpy()
    result = np.concatenate([chunk.frames[0] for chunk in chunks])
    assert np.abs(result.astype(int) - expected).max() <= 1 and (result != expected).mean() < 1e-3


def test_latents_are_those_of_encoded_data(pipeline: StreamingPipeline, model_folder: Path, tmp_path: Path) -> None:
    entry = write(tmp_path / "clip.mp4", TWO_CHUNKS)
    (reference,) = plan_clips([entry], ClipSpec(2))
    clip = read_clip(reference, size=(HEIGHT, WIDTH))
    autoencoder = ModelFolder.open(model_folder).load_vae(dtype=torch.float32)
    expected_TCHW = encode_clip(autoencoder, clip.frames, chunks=WAN_CHUNKS, precision="fp32")
    context = BeginningChoice(video=entry.video).encode(pipeline.models).footage
    assert [latents.shape[2] for latents in context] == [8, 8]
    assert torch.equal(torch.cat(context, dim=2)[0].transpose(0, 1).bfloat16(), expected_TCHW)


@pytest.mark.parametrize("rate", [12, 24, 50])
@pytest.mark.parametrize(("seconds", "count"), [(None, TWO_CHUNKS), (1.5, ONE_CHUNK)])
def test_the_last_chunks_of_a_file_are_read_by_time(
    tmp_path: Path, rate: int, seconds: float | None, count: int
) -> None:
    path = clock.write(tmp_path / "clock.mp4", [number / rate for number in range(4 * rate)])
    times = clock.shown_times(READER.read(path, seconds=seconds))
    last = int((4 - 0.5 / rate) * 24)  # the last frame is used for half of its own time
    expected = np.arange(last - count + 1, last + 1) / 24
    assert len(times) == count and np.abs(times - expected).max() <= 0.5 / rate + 0.01


def test_footage_of_one_chunk_is_used_and_shorter_one_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", ONE_CHUNK).video
    assert len(READER.read(path)) == ONE_CHUNK
    short = write(tmp_path / "short.mp4", ONE_CHUNK - 1).video
    message = r"short.mp4 has 28 frames at 24 per second, 1.17 s; expected one chunk, 29 frames or 1.21 s"
    for call in (READER.read, READER.check):
        with pytest.raises(UserError, match=message):
            call(short, seconds=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"video": square(90), "image": np.zeros((8, 8, 3), np.uint8)}, "image and video exclude each other"),
        ({"video_seconds": 2}, "video_seconds is 2, but there is no video"),
        ({"video": square(90), "video_seconds": 1}, "video_seconds is 1; expected from 1.21, one chunk, to 2.54, as"),
        ({"video": square(90), "video_seconds": 3}, "video_seconds is 3; expected from 1.21, one chunk, to 2.54, as"),
        ({"video": square(90), "video_seconds": "2"}, "video_seconds: seconds is '2'; expected a number"),
        ({"video": square(28)}, "video has 28 frames at 24 per second"),
        ({"video": square(90).float()}, r"video is torch.float32 \[90, 64, 96, 3\]; use a path, or uint8"),
        ({"video": np.zeros((90, 8, 8), np.uint8)}, r"video is uint8 \[90, 8, 8\]; use a path, or uint8"),
        ({"video": 7}, "video is 7; expected a name or a path"),
        ({"video": "missing.mp4"}, "there is no video missing.mp4"),
        ({"video": __file__}, "is not a video in a supported format"),
    ],
)
def test_footage_that_cannot_be_used_is_refused(
    pipeline: StreamingPipeline, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pipeline.stream(PROMPT, seconds=1, **options)
    with pytest.raises(UserError, match=message):
        pipeline.generate_batch([[PROMPT]], seconds=[1], seeds=[0], **options)


def test_a_model_without_an_encoder_is_named(pipeline: StreamingPipeline, tmp_path: Path) -> None:
    small.save(tmp_path / "model", has_vae=False)
    folder = ModelFolder.open(tmp_path / "model")
    models = replace(pipeline.models, encoder=FrameEncoder(folder.load_vae))
    with pytest.raises(CheckpointError, match="vae") as caught:
        StreamingPipeline(models).stream(PROMPT, seconds=1, video=square(90))
    assert "\n" not in str(caught.value)


def test_a_session_seeks_and_is_restored_after_footage(
    pipeline: StreamingPipeline, footage: Tensor, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"seconds": 4, "seed": 5, "video": footage, "video_seconds": 1.5}
    expected = video(pipeline, PROMPT, **options)
    with pipeline.session(PROMPT, **options) as session:
        assert session.next_chunk == 1
        first = [next(session)]
        session.snapshot(tmp_path / "session.safetensors")
        with pytest.raises(UserError, match="chunk 0 is footage; use 1 or a later one"):
            session.seek(0)
        session.seek(1)
        again = list(session)
    with pipeline.restore(tmp_path / "session.safetensors") as restored:
        with pytest.raises(UserError, match="chunk 0 is footage"):
            restored.seek(0)
        rest = list(restored)
    for chunks in ([*first, *rest], again):
        frames = np.concatenate([chunk.frames[0] for chunk in chunks])
        assert frames.shape == expected.shape and np.abs(frames.astype(int) - expected).max() <= 1


def test_recache_changes_the_past_that_is_footage(pipeline: StreamingPipeline, footage: Tensor) -> None:
    frames = []
    for mode in ("keep", "recache"):
        with pipeline.session(PROMPT, seconds=2, video=footage) as session:
            session.set_prompt(OTHER, mode=mode)
            frames.append(np.concatenate([chunk.frames[0] for chunk in session]))
    assert not np.array_equal(*frames)
