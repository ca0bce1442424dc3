"""Encoded clips equal those of a direct encoding, for any division into shares and after interruptions."""

import json
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from longvideo.checkpoint.folder import ModelFolder
from longvideo.cli.main import main
from longvideo.data.clips import ClipSpec, plan_clips, read_clip
from longvideo.data.encoded import EncodedDataset
from longvideo.data.manifest import TimedShotEntry, VideoEntry, read_manifest, write_manifest
from longvideo.errors import UserError
from longvideo.files import locked
from tests.checkpoint import small
from tests.test_files import no_file_longer_than

from . import footage

CLIP_BYTES = 2 * 8 * 4 * 4 * 6 * 2
TWO_CLIPS = ["--shard-bytes", str(2 * CLIP_BYTES)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    small.save(folder)
    return folder


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return footage.footage(tmp_path_factory.mktemp("footage"))


@pytest.fixture(scope="module")
def encoded(manifest: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of two clips, written by one command."""
    out = tmp_path_factory.mktemp("encoded") / "clips"
    assert encode(manifest, model, out, *TWO_CLIPS) == 0
    return out


def encode(manifest: Path, model: Path, out: Path, *more: str, workers: int = 0) -> int:
    options = ["--chunks", "2", "--device", "cpu", "--workers", str(workers), *more]
    return main(["data", "encode", str(manifest), "--model", str(model), "--out", str(out), *options])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


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


def test_captions_after_cuts_are_encoded_with_the_words_that_announce_them(
    manifest: Path, encoded: Path, tmp_path: Path
) -> None:
    prefix, cut, first = "left left ", "a blue ball moves left", "a red ball"
    small.save(tmp_path / "model", replace(small.SETTINGS, cut_prefix=prefix))
    assert encode(manifest, tmp_path / "model", tmp_path / "clips", *TWO_CLIPS) == 0
    announced, plain = EncodedDataset.open(tmp_path / "clips"), EncodedDataset.open(encoded)
    encoder = ModelFolder.open(tmp_path / "model").load_text_encoder()
    expected = encoder.encode([prefix + cut])[0][0]
    torch.testing.assert_close(announced.text(prefix + cut), expected, rtol=2**-8, atol=1e-4)
    assert all(torch.equal(announced.text(text), plain.text(text)) for text in ("", first, cut))
    with pytest.raises(UserError, match="has no features of"):
        announced.text(prefix + first)
    announced.check_texts(prefix)
    announced.check_texts("")
    plain.check_texts("")
    with pytest.raises(
        UserError, match="'left left a blue ball moves left', .* cut_prefix='left left ' reads at a cut of clip 2"
    ):
        plain.check_texts(prefix)


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


def test_a_rerun_after_a_lost_shard_gives_the_same_bytes(
    manifest: Path, model: Path, encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "clips"
    shutil.copytree(encoded, out)
    (out / "latents-00002-of-00003.safetensors").unlink()
    (out / "text-00001-of-00005.safetensors").unlink()
    cut = out / "latents-00001-of-00003.safetensors"
    cut.write_bytes(cut.read_bytes()[:-10])
    index = out / "latents-00001-of-00003.jsonl"
    index.write_bytes(index.read_bytes()[:-10])
    (out / f".{cut.name}.0a1b2c3d.part").write_bytes(b"what a killed run leaves")
    kept = (out / "latents-00000-of-00003.safetensors").stat().st_mtime_ns
    assert encode(manifest, model, out, *TWO_CLIPS) == 0
    assert contents(out) == contents(encoded)
    assert (out / "latents-00000-of-00003.safetensors").stat().st_mtime_ns == kept
    capsys.readouterr()
    assert encode(manifest, model, out, *TWO_CLIPS) == 0
    assert "6 clips, all encoded before, 0 damaged" in capsys.readouterr().err


def test_a_run_that_stops_at_a_damaged_clip_continues_after_its_repair(
    manifest: Path, model: Path, encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(manifest.parent, tmp_path / "footage")
    copy, video, out = tmp_path / "footage" / "manifest.jsonl", tmp_path / "footage/videos/2.mp4", tmp_path / "clips"
    footage.damage(video)
    assert encode(copy, model, out, *TWO_CLIPS, "--max-bad", "0") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"unreadable clips: 1, more than --max-bad 0 \(clip [45]: .*2.mp4 is damaged after", error)
    assert sorted(path.name for path in out.glob("latents-*.safetensors")) == [
        "latents-00000-of-00003.safetensors",
        "latents-00001-of-00003.safetensors",
    ]
    with pytest.raises(UserError, match=r"latents-00002-of-00003.jsonl is missing; .* --shard-of 0/1"):
        EncodedDataset.open(out)
    shutil.copy(manifest.parent / "videos" / "2.mp4", video)
    assert encode(copy, model, out, *TWO_CLIPS) == 0
    assert contents(out) == contents(encoded)


def test_damaged_clips_are_left_out_counted_and_noted(
    manifest: Path, model: Path, encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(manifest.parent, tmp_path / "footage")
    copy, out = tmp_path / "footage" / "manifest.jsonl", tmp_path / "clips"
    footage.damage(tmp_path / "footage" / "videos" / "0.mp4")
    assert encode(copy, model, out, *TWO_CLIPS) == 0
    error = capsys.readouterr().err
    assert "left out clip 1: " in error
    dataset, whole = EncodedDataset.open(out), EncodedDataset.open(encoded)
    lost = len(whole) - len(dataset)
    assert f"{6 - lost} clips, {lost} damaged and left out" in error
    assert [clip.number for clip in dataset.skipped] == list(range(2 - lost, 2)) and lost in (1, 2)
    assert dataset.skipped[-1].source == whole.clips[1].source
    assert "0.mp4 is damaged" in dataset.skipped[-1].why
    assert [clip.number for clip in dataset.clips] == list(range(2 - lost)) + [2, 3, 4, 5]
    assert torch.equal(dataset.latents(2 - lost, 0, 16), whole.latents(2, 0, 16))
    # skipped clips of earlier runs are counted
    (out / "latents-00002-of-00003.safetensors").unlink()
    footage.damage(tmp_path / "footage" / "videos" / "2.mp4")
    assert encode(copy, model, out, *TWO_CLIPS, "--max-bad", str(lost)) == 2
    assert f"unreadable clips: {lost + 1}, more than --max-bad {lost} (clip " in capsys.readouterr().err


def test_a_share_with_no_readable_clip_is_an_error(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = footage.footage(tmp_path / "footage")
    for number in range(3):
        video = tmp_path / "footage" / "videos" / f"{number}.mp4"
        video.write_bytes(video.read_bytes()[:200])
    assert encode(path, model, tmp_path / "clips") == 2
    assert "unreadable clips: 6, more than --max-bad 5" in capsys.readouterr().err


def test_two_shares_equal_one_run(manifest: Path, model: Path, encoded: Path, tmp_path: Path) -> None:
    out = tmp_path / "clips"
    assert encode(manifest, model, out, *TWO_CLIPS, "--shard-of", "1/2", workers=2) == 0
    with pytest.raises(UserError, match="is missing; copy it too, or finish share 0 of 2"):
        EncodedDataset.open(out)
    assert encode(manifest, model, out, *TWO_CLIPS, "--shard-of", "0/2") == 0
    shares, one = EncodedDataset.open(out), EncodedDataset.open(encoded)
    assert [json.loads(line)["number"] for line in (out / "latents-00000-of-00004.jsonl").open()] == [0, 2]
    assert [json.loads(line)["number"] for line in (out / "latents-00003-of-00004.jsonl").open()] == [5]
    assert len(shares) == len(one)
    for index, (clip, same) in enumerate(zip(shares.clips, one.clips, strict=True)):
        assert (clip.number, clip.captions, clip.cuts, clip.source) == (
            same.number,
            same.captions,
            same.cuts,
            same.source,
        )
        assert torch.equal(shares.latents(index, 0, 16), one.latents(index, 0, 16))
    for caption in ("", *(caption for clip in one.clips for caption in clip.captions)):
        assert torch.equal(shares.text(caption), one.text(caption))


@pytest.mark.parametrize("longest", [300, 1500, 4000])
def test_a_full_disk_is_one_line_and_what_was_complete_is_kept(
    longest: int, manifest: Path, model: Path, encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "clips"
    with no_file_longer_than(longest):
        assert encode(manifest, model, out, *TWO_CLIPS) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    file = re.match(rf"error: cannot write {out}/(\S+): file too large; no part of it remains", message)
    assert file and not (out / file[1]).exists() and not list(out.glob(".*"))
    remedy = f"; the complete files in {out} stay, and the same command continues after them"
    assert message[file.end() :] == ("" if file[1] == "dataset.json" else remedy)
    complete = contents(encoded)
    assert all(complete[name] == content for name, content in contents(out).items())
    assert ("dataset.json" in contents(out)) == (file[1] != "dataset.json")
    assert encode(manifest, model, out, *TWO_CLIPS) == 0
    assert contents(out) == complete


def test_a_full_disk_after_overwrite_names_the_command_that_continues(
    manifest: Path, model: Path, encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "clips"
    with no_file_longer_than(4000):
        assert encode(manifest, model, out, *TWO_CLIPS, "--overwrite") == 2
    assert "stay, and the same command without --overwrite continues after them\n" in capsys.readouterr().err
    assert encode(manifest, model, out, *TWO_CLIPS) == 0
    assert contents(out) == contents(encoded)


def test_a_share_is_encoded_by_one_process_at_a_time(
    manifest: Path, model: Path, encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "clips"
    out.mkdir()
    with locked(out / ".share-0-of-1.lock", busy=""):
        assert encode(manifest, model, out, *TWO_CLIPS, "--overwrite") == 2
        assert "share 0 of 1 of" in capsys.readouterr().err
        assert [path.name for path in out.iterdir()] == [".share-0-of-1.lock"]
    assert encode(manifest, model, out, *TWO_CLIPS) == 0
    assert contents(out) == contents(encoded)


def test_processes_that_decode_change_no_byte(manifest: Path, model: Path, encoded: Path, tmp_path: Path) -> None:
    assert encode(manifest, model, tmp_path / "clips", *TWO_CLIPS, workers=1) == 0
    assert contents(tmp_path / "clips") == contents(encoded)


def test_other_options_need_another_folder_or_overwrite(
    manifest: Path, model: Path, encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "clips"
    shutil.copytree(encoded, out)
    assert encode(manifest, model, out) == 2
    assert "dataset.json has clips_per_shard=2, but this run has " in capsys.readouterr().err
    assert encode(manifest, model, out, *TWO_CLIPS, "--height", "32") == 2
    assert "has height=64, but this run has 32; use the same manifest, model and options" in capsys.readouterr().err
    assert contents(out) == contents(encoded)
    assert encode(manifest, model, out, "--height", "32", "--overwrite") == 0
    dataset = EncodedDataset.open(out)
    assert dataset.latents(0, 0, 1).shape == (4, 1, 2, 6)
    assert sorted(contents(out)) == [
        "dataset.json",
        "latents-00000-of-00001.jsonl",
        "latents-00000-of-00001.safetensors",
        "text-00000-of-00001.safetensors",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--height", "40"], "--height is 40, expected a multiple of 32; use 32"),
        (["--shard-of", "2/2"], "--shard-of is '2/2', expected I/N with I from 0 to N - 1"),
        (["--shard-of", "half"], "--shard-of is 'half', expected I/N"),
        (["--chunks", "9"], "use fewer chunks"),
    ],
)
def test_bad_options_write_nothing(
    manifest: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert encode(manifest, model, tmp_path / "clips", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "clips").exists()


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


def test_words_outside_the_vocabulary_and_conversions_are_reported(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.mp4", "b.mp4"):
        footage.write(tmp_path / name, 61)
    captions = ["a red zeppelin", "a blue zeppelin and a quokka"]
    entries = [
        VideoEntry(Path(name), None, None, (TimedShotEntry(text),))
        for name, text in zip(("a.mp4", "b.mp4"), captions, strict=True)
    ]
    write_manifest(tmp_path / "manifest.jsonl", entries)
    assert encode(tmp_path / "manifest.jsonl", model, tmp_path / "clips") == 0
    error = capsys.readouterr().err
    assert "warning: the model's vocabulary does not contain 'zeppelin' (2), " in error and "'quokka' (1)" in error
    assert error.count("warning") == 1 and "HDR" not in error and "interlaced" not in error
    # what is complete is not encoded again, and nothing is reported again
    assert encode(tmp_path / "manifest.jsonl", model, tmp_path / "clips") == 0
    assert "warning" not in capsys.readouterr().err
