"""Other decoders in the pipeline: files, the small decoder of a folder, precisions, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longvideo.checkpoint.decoders import choose_decoder, open_decoder, save_decoder
from longvideo.checkpoint.folder import ModelFolder
from longvideo.errors import CheckpointError, UserError
from longvideo.infer.decoder_choice import RUNS, faster_precision, with_decoder_precision
from longvideo.infer.fit.formats import check_shapes
from longvideo.infer.fit.memory import Workload, estimate
from longvideo.infer.fit.placement import Placement
from longvideo.infer.fit.shapes import folder_shapes, preset_shapes
from longvideo.infer.loading import load_models
from longvideo.infer.pipeline import StreamingPipeline
from longvideo.quantization.number_formats import NumberFormats
from longvideo.streaming.decoder_convolutions import Grid
from longvideo.vae.autoencoder import Autoencoder
from longvideo.vae.config import AutoencoderConfig
from longvideo.vae.tae import TinyAutoencoderConfig, TinyDecoder
from tests.checkpoint.test_decoders import pruned
from tests.decoder_files import CODERS, SMALL, save, tiny_weights
from tests.infer import small
from tests.infer.test_pipeline import video

PROMPT = "a red ball bounces"
CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)
OWN = replace(SMALL, z_dim=8)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with decoders of the small model's latents, and with models of Wan2.2's latents."""
    folder = tmp_path_factory.mktemp("decoders")
    save(folder / "taew2_2.pth", tiny_weights(OWN))
    save(folder / "lighttaew2_2.safetensors", tiny_weights(OWN))
    save(folder / "taew2_2_super.pth", tiny_weights(replace(OWN, form="super", decoder_widths=(16, 12, 8, 4))))
    small.save(folder / "wan", latent_channels=48)
    small.save(folder / "no_vae", latent_channels=48, has_vae=False)
    save(folder / "48_taew2_2.pth", tiny_weights())
    save(folder / "48_taew2_2_decoder.pth", tiny_weights(coders=("decoder",)))
    save(folder / "MG-LightVAE.pth", {"state_dict": {"gen_model": pruned().state_dict()}})
    return folder


def open_pipeline(model: Path, decoder: Path | str | None = None, **options: Any) -> StreamingPipeline:
    name = None if decoder is None else str(decoder)
    options = {"device": "cpu", "dtype": torch.float32, "decoder": name, **options}
    return StreamingPipeline.from_pretrained(model, **options)


def recorded(pipeline: StreamingPipeline, chunks: int, **options: Any) -> tuple[np.ndarray, Tensor]:
    """Return the frames of a session, and its latents."""
    with pipeline.session(PROMPT, **options) as session:
        parts = list(islice(session, chunks + 1))  # the first chunk has two parts
    latents = {part.step.index: part.record.latents for part in parts}
    return np.concatenate([part.frames for part in parts], axis=1), torch.cat(list(latents.values()), dim=2)


def assert_same(result: np.ndarray, expected: np.ndarray) -> None:
    """Compare frames up to rounding, which depends on how many frames are convolved together."""
    assert result.shape == expected.shape
    difference = np.abs(result.astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


@pytest.mark.parametrize(
    ("model", "decoder", "kind"),
    [
        (None, "taew2_2.pth", "TAEW2.2"),
        (None, "lighttaew2_2.safetensors", "lighttae"),
        (None, "taew2_2_super.pth", "TAEW2.2 super"),
        ("wan", "MG-LightVAE.pth", "pruned Wan2.2 VAE"),
        ("no_vae", "48_taew2_2.pth", "TAEW2.2"),
        ("no_vae", "MG-LightVAE.pth", "pruned Wan2.2 VAE"),
    ],
)
def test_frames_are_those_that_the_decoder_gives_at_once(
    model: str | None, decoder: str, kind: str, files: Path, model_folder: Path
) -> None:
    pipeline = open_pipeline(model_folder if model is None else files / model, files / decoder)
    assert pipeline.models.decoder.name == kind
    assert f"decoding on cpu by {kind} in float32" in pipeline.start_line()
    frames, latents = recorded(pipeline, 3)
    assert frames.shape == (1, 93, small.HEIGHT, small.WIDTH, 3)
    assert_same(frames, pipeline.models.decoder.plain(latents).numpy())


def test_a_seek_gives_the_same_frames(files: Path, model_folder: Path) -> None:
    pipeline = open_pipeline(model_folder, files / "taew2_2.pth")
    with pipeline.session(PROMPT) as session:
        parts = list(islice(session, 5))
        session.seek(3)
        again = next(session)
    assert again.step.index == parts[-1].step.index == 3
    # it had attended to a chunk that has left the window, so its latents differ a little
    latents = torch.cat([*(part.record.latents for part in parts[1:-1]), again.record.latents], dim=2)
    assert_same(again.frames, pipeline.models.decoder.plain(latents)[:, -32:].numpy())


def test_a_batch_holds_what_each_video_is_alone(files: Path, model_folder: Path) -> None:
    pipeline = open_pipeline(model_folder, files / "taew2_2.pth")
    prompts = [[PROMPT], ["a blue square spins"]]
    batch = pipeline.generate_batch(prompts, seconds=[3], seeds=[1, 2])
    for row, (own, seed) in enumerate(zip(prompts, (1, 2), strict=True)):
        assert np.abs(video(pipeline, own, seconds=3, seed=seed).astype(int) - batch[row]).max() <= 1


@pytest.mark.parametrize(
    ("model", "decoder"),
    [("wan", "48_taew2_2_decoder.pth"), ("no_vae", "48_taew2_2.pth"), ("no_vae", "MG-LightVAE.pth")],
)
def test_a_picture_is_encoded_by_the_model_or_else_by_the_file(model: str, decoder: str, files: Path) -> None:
    pipeline = open_pipeline(files / model, files / decoder)
    pixels = np.full((small.HEIGHT, small.WIDTH, 3), 90, np.uint8)
    _, latents = recorded(pipeline, 1, image=pixels)
    picture = torch.full((1, 3, 1, small.HEIGHT, small.WIDTH), 90 / 127.5 - 1)
    stored = open_decoder(files / decoder, AutoencoderConfig.wan22())
    encoder = ModelFolder.open(files / model).load_vae() if model == "wan" else stored.load_encoder()
    with torch.inference_mode():
        if isinstance(encoder, Autoencoder):
            expected = encoder.normalize(encoder.encode(picture)[0].chunk(2, dim=1)[0])
        else:
            expected = encoder.encode_video(picture)
    assert torch.allclose(latents[:, :, :1], expected, atol=1e-4)


def test_a_picture_needs_an_encoder(files: Path) -> None:
    pipeline = open_pipeline(files / "no_vae", files / "48_taew2_2_decoder.pth")
    assert recorded(pipeline, 1)[0].shape[1] == 29
    with pytest.raises(CheckpointError, match="48_taew2_2_decoder.pth has a decoder only"):
        pipeline.session(PROMPT, image=np.zeros((32, 64, 3), np.uint8))


def test_a_model_without_an_autoencoder_needs_a_decoder(files: Path) -> None:
    for name in (None, "wan"):
        with pytest.raises(CheckpointError, match="no vae, only transformer, text_encoder; .*or --decoder with a file"):
            open_pipeline(files / "no_vae", name)


def test_the_small_decoder_of_a_folder_is_the_default_on_a_cpu_alone(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    with pytest.raises(UserError, match="model has no small decoder, which would be decoder.safetensors"):
        choose_decoder(ModelFolder.open(folder), "small", device=CPU)
    save(folder / "decoder.safetensors", tiny_weights(OWN, coders=CODERS[:1]))
    with pytest.raises(CheckpointError, match="decoder.safetensors is TAEW2.2 or lighttae"):
        open_pipeline(folder)
    write_small(folder)
    opened = ModelFolder.open(folder)
    own_kind = "distilled decoder"
    for name, device, kind in ((None, CPU, own_kind), (None, FIRST, None), ("small", FIRST, own_kind)):
        stored = choose_decoder(opened, name, device=device)
        assert (None if stored is None else stored.kind) == kind
    assert open_pipeline(folder).models.decoder.name == own_kind
    own = open_pipeline(folder, "wan")
    assert own.models.decoder.name == "the autoencoder"
    assert np.array_equal(video(own, PROMPT, seconds=1), video(open_pipeline(model_folder), PROMPT, seconds=1))


def write_small(folder: Path) -> None:
    """Write the small decoder of a model folder."""
    torch.manual_seed(0)
    save_decoder(folder, "decoder", TinyDecoder(OWN), model="small", dtype=torch.float32)


def test_fp8_on_a_cpu_is_near_float32(tmp_path: Path) -> None:
    small.save(tmp_path / "model", latent_channels=48)
    file = save(tmp_path / "vae.pth", wide().state_dict())
    exact, rounded = (
        open_pipeline(tmp_path / "model", file, decoder_precision=name) for name in ("fp32", "fp8-emulated")
    )
    assert "in fp8-emulated: emulated by reference" in rounded.start_line()
    one, two = (recorded(pipeline, 1)[0].astype(float) for pipeline in (exact, rounded))
    assert 1e-4 < np.linalg.norm(one - two) / np.linalg.norm(one) < 0.05


def wide() -> Autoencoder:
    """Return an autoencoder of Wan2.2's latents whose levels have multiples of 16 channels."""
    torch.manual_seed(0)
    return Autoencoder(replace(AutoencoderConfig.wan22(), base_dim=8, decoder_base_dim=16)).eval()


def test_precisions_are_the_data_types_of_the_weights(files: Path, model_folder: Path) -> None:
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        pipeline = open_pipeline(model_folder, files / "taew2_2.pth", decoder_precision=name, dtype=None)
        assert pipeline.formats.decoder == name
        assert f"by TAEW2.2 in {str(dtype).removeprefix('torch.')}" in pipeline.start_line()
        assert {x.dtype for x in decoder_state(pipeline)} == {dtype}
    assert open_pipeline(model_folder).formats.decoder == "fp32"


def decoder_state(pipeline: StreamingPipeline) -> tuple[Tensor, ...]:
    """Return what a decoder keeps after one latent frame."""
    decoder = pipeline.models.decoder.start(Grid(1, 1, 2, 4))
    decoder.decode(torch.zeros(1, 8, 1, 2, 4))
    return decoder.state()


def test_a_cpu_takes_bfloat16_only_where_it_is_clearly_faster() -> None:
    calls: list[torch.dtype] = []

    def seconds(*times: float) -> Any:
        calls.clear()
        values = dict(zip((torch.float32, torch.bfloat16), times, strict=True))

        def measure(dtype: torch.dtype) -> float:
            calls.append(dtype)
            # the first run of each is not counted, and a single slow run does not matter
            return {0: 0.0, 1: 100.0}.get((len(calls) - 1) // 2, values[dtype])

        return measure

    assert faster_precision(seconds(1.0, 0.5)) == "bf16"
    assert calls == [torch.float32, torch.bfloat16] * (1 + RUNS)
    assert faster_precision(seconds(1.0, 0.9)) == "fp32"
    assert faster_precision(seconds(0.2, 1.0)) == "fp32"


def test_auto_becomes_a_precision() -> None:
    config, auto = AutoencoderConfig.tiny(), NumberFormats()
    assert with_decoder_precision(auto, config, Placement(CPU, CPU)).decoder in ("fp32", "bf16")
    assert with_decoder_precision(auto, OWN, Placement(CPU, CPU, dtype=torch.float32)).decoder == "fp32"
    assert with_decoder_precision(auto, OWN, Placement(CPU, FIRST)).decoder == "bf16"
    chosen = NumberFormats(decoder="fp8")
    assert with_decoder_precision(chosen, config, Placement(CPU, CPU)) is chosen


def test_measuring_leaves_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    with_decoder_precision(NumberFormats(), TinyAutoencoderConfig("base", 8, (8, 6, 4, 4)), Placement(CPU, CPU))
    assert torch.get_num_threads() == before


def test_a_tiny_decoder_is_not_shared_and_has_no_fp8(files: Path, model_folder: Path) -> None:
    folder = ModelFolder.open(model_folder)
    placement = Placement(FIRST, SECOND, 0.2)
    with pytest.raises(UserError, match="decode_share is 0.2, but the decoder is TAEW2.2, which runs on one device"):
        load_models(folder, placement, decoder_name=str(files / "taew2_2.pth"))
    with pytest.raises(UserError, match="the decoder is TAEW2.2, which has no FP8 form; use --decoder-precision bf16"):
        open_pipeline(model_folder, files / "taew2_2.pth", decoder_precision="fp8-emulated")
    with pytest.raises(UserError, match="autoencoder, whose levels have 8, 16 channels; FP8 needs multiples of 16"):
        open_pipeline(model_folder, decoder_precision="fp8-emulated")
    check_shapes(preset_shapes("wan2.2-ti2v-5b"), NumberFormats(decoder="fp8"), decode_share=0.2, name="5B")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_a_model_without_an_autoencoder_is_estimated(precision: str, files: Path) -> None:
    folder = ModelFolder.open(files / "no_vae")
    stored = choose_decoder(folder, str(files / "48_taew2_2.pth"), device=CPU)
    shapes = folder_shapes(folder, stored)
    assert (shapes.decoder_name, shapes.decoder_config) == ("TAEW2.2", SMALL)
    assert shapes.autoencoder == AutoencoderConfig.wan22()
    wan = replace(shapes, decoder=replace(shapes.autoencoder, decoder_base_dim=16), decoder_name="pruned")
    for own in (shapes, wan) if precision != "fp8" else (wan,):
        formats = NumberFormats("bf16", decoder=NumberFormats.parse(decoder=precision).decoder)
        parts = estimate(Workload(shapes=own, formats=formats, placement=Placement(FIRST, FIRST)))
        assert sum(part.bytes for part in parts) > 1e9
        assert {"autoencoder", "decoder"} <= {part.name for part in parts}


def test_tiny_decodes_with_its_small_decoder_on_a_cpu_nearly_as_with_its_autoencoder() -> None:
    frames = {}
    for name in (None, "wan"):
        pipeline = StreamingPipeline.from_pretrained("tiny", device="cpu", dtype=torch.float32, decoder=name)
        shown = pipeline.stream("a small cyan star spins on a cream background", seconds=1.2, steps=2, seed=0)
        frames[pipeline.models.decoder.name] = np.concatenate(list(shown)).astype(np.float32)
    assert list(frames) == ["distilled decoder", "the autoencoder"]
    small_one, full = frames.values()
    assert small_one.shape == full.shape
    # as measured on held-out clips; another picture of the same kind has about 15 dB
    assert 10 * np.log10(255**2 / np.square(small_one - full).mean()) > 38
