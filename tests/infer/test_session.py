"""Sessions: changes take effect at the chunk of their receipt, seeks, pauses and snapshots."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from longvideo.errors import UserError
from longvideo.infer.generation import GeneratedChunk
from longvideo.infer.pipeline import Script, ShotRequest, StreamingPipeline
from longvideo.infer.session import Session
from longvideo.infer.timeline import Receipt
from longvideo.text.encoder import TextEncoder
from tests.infer.test_pipeline import torch_threads, video

PROMPTS = ("a red ball bounces", "a blue square spins at night")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Denoise and decode in the thread of the test, so that nothing runs ahead of it."""
    with torch_threads(1):
        yield


@pytest.fixture(scope="module")
def mixed_pipeline(model_folder: Path) -> StreamingPipeline:
    return StreamingPipeline.from_pretrained(model_folder, device="cpu", dtype=torch.float32, kv_cache="nvfp4-mixed")


def take(session: Session, chunks: int) -> list[GeneratedChunk]:
    """Return the parts of the next chunks."""
    parts: list[GeneratedChunk] = []
    while sum(part.is_complete for part in parts) < chunks:
        parts.append(next(session))
    return parts


def frames_of(parts: Iterable[GeneratedChunk]) -> np.ndarray:
    return np.concatenate([part.frames[0] for part in parts])


def near(result: np.ndarray, expected: np.ndarray) -> bool:
    """Return whether two videos differ only by rounding, which depends on the shapes of products."""
    return result.shape == expected.shape and np.abs(result.astype(int) - expected).max() <= 1


def test_a_session_switches_prompts_at_the_chunk_of_its_receipt(pipeline: StreamingPipeline) -> None:
    with pipeline.session(PROMPTS[0], seed=5) as session:
        chunks = list(islice(session, 3))
        assert session.set_prompt(PROMPTS[1], mode="keep") == Receipt(1, 2)
        chunks += islice(session, 1)
        assert session.set_prompt(PROMPTS[0], mode="cut") == Receipt(2, 3)
        with pytest.raises(UserError, match="empty"):
            session.set_prompt(" ")
        with pytest.warns(UserWarning, match="'zebra'"):
            session.set_prompt("a zebra", mode="keep")
        chunks += islice(session, 2)
    assert [chunk.step.index for chunk in chunks] == [0, 0, 1, 2, 3, 4]
    assert [chunk.step.prompts[0] for chunk in chunks] == [*[PROMPTS[0]] * 3, PROMPTS[1], *["a zebra"] * 2]
    assert [chunk.step.cut for chunk in chunks] == [*[False] * 4, True, False]
    assert all(chunk.seconds > 0 for chunk in chunks)
    script = Script((ShotRequest(PROMPTS[0], 61 / 24), ShotRequest(PROMPTS[1], 32 / 24, cut=False)))
    expected = video(pipeline, script, seed=5)
    assert np.array_equal(np.concatenate([chunk.frames[0] for chunk in chunks[:4]]), expected)
    assert next(session, None) is None


def test_a_session_that_runs_ahead_switches_at_the_chunk_of_its_receipt(pipeline: StreamingPipeline) -> None:
    with torch_threads(2), pipeline.session(PROMPTS[0]) as session:
        chunks = list(islice(session, 4))
        receipt = session.set_prompt(PROMPTS[1])
        switch = receipt.effective_at
        assert 3 <= switch <= 6 and receipt.accepted_at == switch - 1
        chunks += islice(session, switch)
    assert [chunk.step.prompts[0] == PROMPTS[1] for chunk in chunks] == [chunk.step.index >= switch for chunk in chunks]
    assert [chunk.step.index for chunk in chunks if chunk.step.cut] == [switch]


def test_planned_shots_are_those_of_a_script(pipeline: StreamingPipeline) -> None:
    with pipeline.session(PROMPTS[0], seed=3, seconds=125 / 24) as session:
        assert session.add_shot(PROMPTS[1], chunk=2) == Receipt(0, 2)
        assert session.add_shot(PROMPTS[0], chunk=3, mode="keep") == Receipt(0, 3)
        with pytest.raises(UserError, match="ends before chunk 4; use 3, its last one"):
            session.add_shot(PROMPTS[0], chunk=4)
        frames = frames_of(session)
        with pytest.raises(UserError, match="chunk 2 has already begun; use 4 or a later one"):
            session.add_shot(PROMPTS[0], chunk=2)
    shots = (
        ShotRequest(PROMPTS[0], 61 / 24),
        ShotRequest(PROMPTS[1], 32 / 24),
        ShotRequest(PROMPTS[0], 32 / 24, cut=False),
    )
    assert np.array_equal(frames, video(pipeline, Script(shots), seed=3))


def test_recache_changes_later_chunks_and_no_earlier_one(pipeline: StreamingPipeline) -> None:
    latents = {}
    for mode in ("keep", "recache"):
        with pipeline.session(PROMPTS[0], seed=3) as session:
            session.add_shot(PROMPTS[1], chunk=2, mode=mode)
            parts = take(session, 3)
            assert [part.step.recache for part in parts] == [False] * 3 + [mode == "recache"]
            latents[mode] = [part.record.latents for part in parts]
    assert all(map(torch.equal, latents["keep"][:3], latents["recache"][:3]))
    assert (latents["keep"][3] - latents["recache"][3]).norm() > 1e-3 * latents["keep"][3].norm()


def test_words_that_announce_a_cut_are_read_with_its_first_chunk_alone(
    pipeline: StreamingPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    announcing = StreamingPipeline(
        replace(pipeline.models, settings=replace(pipeline.models.settings, cut_prefix="a red ball moves. "))
    )
    read: list[str] = []
    encode = TextEncoder.encode
    monkeypatch.setattr(TextEncoder, "encode", lambda self, texts: read.extend(texts) or encode(self, texts))
    with announcing.session(PROMPTS[0], seed=5) as session:
        take(session, 1)
        session.set_prompt(PROMPTS[1], mode="cut")
        before = take(session, 2)
        session.seek(2)
        again = take(session, 1)
    announced = f"a red ball moves. {PROMPTS[1]}"
    assert [text for text in read if text] == [PROMPTS[0], announced, PROMPTS[1]] * 2
    assert near(again[-1].frames[0], before[-1].frames[0])


def test_a_seek_gives_the_same_frames_again(pipeline: StreamingPipeline) -> None:
    with pipeline.session(PROMPTS[0], seed=4) as session:
        first = frames_of(take(session, 3))
        for chunk, start in ((2, 61), (0, 0), (1, 29)):
            assert session.seek(chunk).effective_at == chunk
            assert session.next_chunk == chunk
            assert near(frames_of(take(session, 3 - chunk)), first[start:])


def test_a_seek_after_a_full_window_gives_nearly_the_same_frames(pipeline: StreamingPipeline) -> None:
    with pipeline.session(PROMPTS[0], seed=4) as session:
        first = frames_of(take(session, 8))
        other = video(pipeline, PROMPTS[0], seconds=253 / 24, seed=5)
        session.seek(7)
        again = frames_of(take(session, 1))
    distance = np.abs(first[221:].astype(int) - again).mean()
    assert distance < 0.2 * np.abs(first[221:].astype(int) - other[221:]).mean()


def test_the_frames_after_a_seek_continue_those_before(pipeline: StreamingPipeline) -> None:
    # the decoder's state, of at most 38 latents, is rebuilt exactly, even if it does not reach the start
    with pipeline.session(PROMPTS[0], seed=4) as session:
        parts = take(session, 8)
        session.seek(7)
        (again,) = take(session, 1)
    latents = [part.record.latents for part in parts if part.is_complete][:7] + [again.record.latents]
    expected = pipeline.models.decoder.plain(torch.cat(latents, dim=2))[0, 221:].numpy()
    assert np.abs(again.frames[0].astype(int) - expected).max() <= 1


def test_a_branch_has_another_prompt_and_deletes_later_chunks(pipeline: StreamingPipeline) -> None:
    with pipeline.session(PROMPTS[0], seed=4) as session:
        session.add_shot("a red square spins", chunk=2)
        session.add_shot("a blue ball bounces", chunk=6)
        take(session, 4)
        assert session.seek(1, prompt=PROMPTS[1], mode="keep") == Receipt(3, 1)
        parts = take(session, 6)
    assert [part.step.index for part in parts] == [1, 2, 3, 4, 5, 6]
    assert [part.step.prompts[0] for part in parts] == [PROMPTS[1]] * 5 + ["a blue ball bounces"]
    assert [part.step.cut for part in parts] == [False] * 5 + [True]


def test_another_beginning_is_another_video(pipeline: StreamingPipeline) -> None:
    with pipeline.session(PROMPTS[0], seed=4) as session:
        take(session, 2)
        session.seek(0, prompt=PROMPTS[1])
        assert np.array_equal(frames_of(take(session, 2)), video(pipeline, PROMPTS[1], seconds=61 / 24, seed=4))


def test_a_seek_to_a_chunk_that_is_not_stored_is_refused(pipeline: StreamingPipeline) -> None:
    with pipeline.session(PROMPTS[0], history_chunks=4) as session:
        take(session, 2)
        with pytest.raises(UserError, match="chunk 3 is not generated yet; the last one is 1"):
            session.seek(3)
        take(session, 7)
        with pytest.raises(UserError, match="chunk 6 is too far back"):
            session.seek(6)
        assert session.seek(9).effective_at == 9
        assert take(session, 1)[0].step.index == 9


def test_a_pause_begins_nothing_until_it_ends(pipeline: StreamingPipeline) -> None:
    with pipeline.session(PROMPTS[0], seed=4) as session:
        before = take(session, 1)
        session.pause()
        assert session.is_paused
        after: list[GeneratedChunk] = []
        waiting = threading.Thread(target=lambda: after.extend(take(session, 1)))
        waiting.start()
        session.set_prompt(PROMPTS[1], mode="keep")
        assert not after
        session.resume()
        waiting.join(timeout=60)
        assert not session.is_paused
    assert [part.step.prompts[0] for part in (*before, *after)] == [PROMPTS[0]] * 2 + [PROMPTS[1]]


def test_closing_frees_a_thread_that_waits_in_a_pause(pipeline: StreamingPipeline) -> None:
    running = threading.active_count()
    session = pipeline.session(PROMPTS[0])
    take(session, 1)
    session.pause()
    ended: list[bool] = []
    waiting = threading.Thread(target=lambda: ended.append(next(session, None) is None))
    waiting.start()
    session.close()
    waiting.join(timeout=60)
    assert ended == [True] and threading.active_count() == running
    assert next(session, None) is None


def test_a_restored_session_continues_with_the_same_frames(pipeline: StreamingPipeline, tmp_path: Path) -> None:
    path = tmp_path / "session.safetensors"
    with pipeline.session(PROMPTS[0], seed=4, seconds=4) as session:
        session.add_shot(PROMPTS[1], chunk=1, mode="keep")
        session.add_shot(PROMPTS[0], chunk=2)
        before = frames_of(take(session, 2))
        session.snapshot(path)
        after = frames_of(session)
    with pipeline.restore(path) as restored:
        assert restored.next_chunk == 2
        assert near(frames_of(restored), after)
        restored.seek(1)
        assert near(frames_of(take(restored, 1)), before[29:])


def test_seeks_snapshots_and_switches_have_the_chunks_of_a_mixed_cache(
    mixed_pipeline: StreamingPipeline, pipeline: StreamingPipeline, tmp_path: Path
) -> None:
    path = tmp_path / "session.safetensors"

    def begin(owner: StreamingPipeline) -> Session:
        session = owner.session(PROMPTS[0], seed=4)
        session.add_shot(PROMPTS[1], chunk=1, mode="recache")
        return session

    with begin(pipeline) as plain, begin(mixed_pipeline) as session:
        exact = frames_of(take(plain, 3))
        first = frames_of(take(session, 2))
        session.snapshot(path)
        frames = np.concatenate([first, frames_of(take(session, 1))])
        # the second chunk attends to the newest one alone
        assert np.array_equal(frames[:61], exact[:61]) and not np.array_equal(frames[61:], exact[61:])
        for chunk, start in ((2, 61), (1, 29)):
            session.seek(chunk)
            assert near(frames_of(take(session, 3 - chunk)), frames[start:])
    with mixed_pipeline.restore(path) as restored, pipeline.restore(path) as with_another_cache:
        assert near(frames_of(take(restored, 1)), frames[61:])
        assert near(frames_of(take(with_another_cache, 1)), exact[61:])


def test_a_snapshot_of_another_model_is_refused(pipeline: StreamingPipeline, tmp_path: Path) -> None:
    path = tmp_path / "session.safetensors"
    with pipeline.session(PROMPTS[0]) as session:
        take(session, 1)
        session.snapshot(path)
    from safetensors.torch import load_file, save_file

    with pytest.raises(UserError, match="a session of another model: its height is 128; expected 32"):
        _changed(path, '"height": 32', '"height": 128')
        pipeline.restore(path)
    save_file(load_file(path), path)
    with pytest.raises(UserError, match="is not a snapshot of a session"):
        pipeline.restore(path)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot read"):
        pipeline.restore(path)


def _changed(path: Path, old: str, new: str) -> None:
    import json

    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["session"])
    metadata["session"] = metadata["session"].replace(old, new)
    save_file(load_file(path), path, metadata=metadata)
