"""The reader of encoded clips returns what was encoded, and names files that are wrong."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from longvideo.checkpoint.folder import ModelFolder
from longvideo.data.clips import ClipSpec, plan_clips, read_clip
from longvideo.data.encoded import EncodedDataset
from longvideo.data.manifest import read_manifest
from longvideo.errors import UserError

from .footage import CLIP_BYTES


def test_latents_are_those_of_encoding_by_hand(manifest: Path, model: Path, encoded: Path) -> None:
    dataset = EncodedDataset.open(encoded)
    autoencoder = ModelFolder.open(model).load_vae()
    references = plan_clips(read_manifest(manifest), ClipSpec(2))
    assert len(dataset) == len(references) == 6
    assert (dataset.num_chunks, dataset.chunk_frames, dataset.channels, dataset.latent_size) == (2, 8, 4, (4, 6))
    for index, reference in enumerate(references):
        frames = read_clip(reference, size=(64, 96)).frames.float() / 127.5 - 1
        video = frames.permute(3, 0, 1, 2)[None]
        with torch.no_grad():
            first, state = autoencoder.encode(video[:, :, :29])
            second, _ = autoencoder.encode(video[:, :, 29:], state)
        moments = torch.cat((first, second), dim=2)
        expected = autoencoder.normalize(moments[:, :4])[0].bfloat16().float()
        assert torch.equal(dataset.latents(index, 0, 16), expected)
        assert expected.std() > 0.01


def test_clips_keep_captions_cuts_and_source(encoded: Path) -> None:
    dataset = EncodedDataset.open(encoded)
    assert [clip.captions for clip in dataset.clips] == [
        ("SQUARE 60", "SQUARE 60"),
        ("SQUARE 60", "SQUARE 60"),
        ("a red ball", "a blue ball moves left"),
        ("a blue ball moves left", "a blue ball moves left"),
        ("SQUARE 180", "SQUARE 180"),
        ("SQUARE 180", "SQUARE 180"),
    ]
    assert [clip.cuts for clip in dataset.clips] == [(True, False)] * 2 + [(True, True)] + [(True, False)] * 3
    assert {clip.num_frames for clip in dataset.clips} == {16}
    (source,) = dataset.clips[3].source
    assert (source.video, source.start_seconds, source.num_frames) == (Path("videos/1.mp4"), 64 / 24, 61)
    assert [clip.shard for clip in dataset.clips] == [f"latents-0000{i}-of-00003" for i in (0, 0, 1, 1, 2, 2)]


def test_text_is_that_of_the_text_encoder_and_trimmed_on_disk(model: Path, encoded: Path) -> None:
    dataset = EncodedDataset.open(encoded)
    text_encoder = ModelFolder.open(model).load_text_encoder()
    captions = ["", "a red ball", "a blue ball moves left", "SQUARE 60", "SQUARE 180"]
    features, rows = text_encoder.encode(captions)
    assert (dataset.text_len, dataset.text_dim, dataset.info.num_captions) == (32, 128, 5)
    for caption, row in zip(captions, rows, strict=True):
        assert torch.equal(dataset.text(caption), features[row].bfloat16().float())
    lengths = []
    for path in sorted(encoded.glob("text-*")):
        with safe_open(path, framework="pt") as file:
            lengths += [file.get_slice(name).get_shape()[0] for name in file.keys()]  # noqa: SIM118
    # each word and the end
    assert sorted(lengths) == [1, 3, 3, 4, 6]
    with pytest.raises(UserError, match="no features of 'a dog'"):
        dataset.text("a dog")


def test_a_slice_reads_its_frames_and_no_others(encoded: Path, tmp_path: Path) -> None:
    dataset = EncodedDataset.open(encoded)
    whole = dataset.latents(1, 0, 16)
    assert whole.dtype == torch.float32 and whole.is_contiguous() and whole.shape == (4, 16, 4, 6)
    for first, last in ((0, 1), (5, 9), (15, 16)):
        assert torch.equal(dataset.latents(1, first, last), whole[:, first:last])
    with pytest.raises(UserError, match="frames 3 to 17 of a clip of 16 latent frames"):
        dataset.latents(1, 3, 17)
    # frames are stored one after another: frames 5 to 8 are the same after all other bytes are overwritten
    shutil.copytree(encoded, tmp_path / "copy")
    path = tmp_path / "copy" / "latents-00000-of-00003.safetensors"
    data = path.read_bytes()
    begin = len(data) - CLIP_BYTES
    kept = slice(begin + 5 * CLIP_BYTES // 16, begin + 9 * CLIP_BYTES // 16)
    header = len(data) - 2 * CLIP_BYTES
    path.write_bytes(data[:header] + bytes(kept.start - header) + data[kept] + bytes(len(data) - kept.stop))
    blank = EncodedDataset.open(tmp_path / "copy")
    assert torch.equal(blank.latents(1, 5, 9), whole[:, 5:9])
    assert not blank.latents(1, 0, 5).any() and not blank.latents(1, 9, 16).any() and not blank.latents(0, 0, 16).any()


def test_a_data_set_can_be_sent_to_another_process(encoded: Path) -> None:
    dataset = EncodedDataset.open(encoded)
    latents = dataset.latents(2, 0, 4)
    assert torch.equal(pickle.loads(pickle.dumps(dataset)).latents(2, 0, 4), latents)


def test_the_reader_names_the_file_that_is_wrong(encoded: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no dataset.json; use a folder that `longvideo data encode` wrote"):
        EncodedDataset.open(tmp_path)

    def broken(name: str, change: bytes | None) -> Path:
        out = tmp_path / name
        shutil.copytree(encoded, out, dirs_exist_ok=True)
        if change is None:
            (out / name).unlink()
        else:
            (out / name).write_bytes(change)
        return out

    info = json.loads((encoded / "dataset.json").read_text())
    text, latents = "text-00003-of-00005.safetensors", "latents-00001-of-00003.safetensors"
    index = "latents-00001-of-00003.jsonl"
    other = json.dumps(info | {"num_clips": 5}).encode()
    cases = {
        "dataset.json has version 2, expected 1": ("dataset.json", json.dumps(info | {"version": 2}).encode()),
        "dataset.json: .*fps is 1000000000; expected a whole number from 1 to 1000": (
            "dataset.json",
            json.dumps(info | {"fps": 10**9}).encode(),
        ),
        "divides 1000000000 items into more than 1000000 files": (
            "dataset.json",
            json.dumps(info | {"num_clips": 10**9}).encode(),
        ),
        "dataset.json: .*no value for fps": (
            "dataset.json",
            json.dumps({key: value for key, value in info.items() if key != "fps"}).encode(),
        ),
        f"{text} is missing": (text, None),
        f"{latents} is missing": (latents, None),
        f"{latents} .* is truncated": (latents, (encoded / latents).read_bytes()[:-1]),
        f"{latents} does not have the tensors that its index lists": (
            latents,
            (encoded / "latents-00000-of-00003.safetensors").read_bytes(),
        ),
        f"{index} lists 1 clips, expected 2": (index, (encoded / index).read_bytes().splitlines(keepends=True)[0]),
        f"{index}:2 is not a line of an index": (index, (encoded / index).read_bytes()[:-20]),
        "safetensors belongs to another dataset.json": ("dataset.json", other),
    }
    for message, (name, change) in cases.items():
        folder = broken(name, change)
        with pytest.raises(UserError, match=message):
            EncodedDataset.open(folder)
        shutil.rmtree(folder)
