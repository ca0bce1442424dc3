"""Chunks have 29, then 32 pixel frames, and frames are counted in chunks."""

from longvideo.model.chunk_frames import WAN_CHUNKS, ChunkFrames


def test_chunks_have_29_then_32_frames() -> None:
    assert [WAN_CHUNKS.start(chunk) for chunk in range(4)] == [0, 29, 61, 93]
    assert ChunkFrames.of_latents(3, temporal_scale=2) == ChunkFrames(5, 6)


def test_whole_chunks_and_chunks_that_hold_frames_enclose_every_length() -> None:
    assert [WAN_CHUNKS.whole_chunks(frames) for frames in (0, 28, 29, 60, 61)] == [0, 0, 1, 1, 2]
    assert [WAN_CHUNKS.chunks_for(frames) for frames in (2.4, 29, 29.04, 61, 480)] == [1, 1, 2, 2, 16]
    for frames in range(1, 300):
        whole, holding = WAN_CHUNKS.whole_chunks(frames), WAN_CHUNKS.chunks_for(frames)
        assert WAN_CHUNKS.start(whole) <= frames <= WAN_CHUNKS.start(holding)
        assert holding - whole == (WAN_CHUNKS.start(whole) != frames)
