"""Encoded clips equal those of a direct encoding, for any division into shares and after interruptions."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longvideo.checkpoint.folder import ModelFolder
from longvideo.data.encoded import EncodedDataset
from longvideo.data.manifest import TimedShotEntry, VideoEntry, write_manifest
from longvideo.errors import UserError
from longvideo.files import locked
from tests.checkpoint import small
from tests.files.test_writing import no_file_longer_than

from . import footage
from .footage import TWO_CLIPS, contents, encode


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
