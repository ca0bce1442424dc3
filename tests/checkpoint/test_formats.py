"""Formats are recognized by content, and models are exchanged with other libraries without changes."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from longvideo.checkpoint import pickle_file, shapes
from longvideo.checkpoint.adapter_files import open_adapter
from longvideo.checkpoint.adapters import layer_sizes
from longvideo.checkpoint.conversion import ConversionOptions, convert_adapter, convert_model
from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.formats import recognize
from longvideo.checkpoint.opening import open_weights
from longvideo.checkpoint.settings import PRESETS, ModelSettings
from longvideo.checkpoint.tensors import Weights
from longvideo.errors import CheckpointError
from longvideo.kernels.nvfp4 import reference
from longvideo.model.attention import Full, Masked
from longvideo.model.config import PRESETS as MODELS
from longvideo.model.layout import TokenLayout
from longvideo.model.transformer import CausalTransformer
from longvideo.quantization.convert import set_product
from longvideo.quantization.products import W4A16
from longvideo.training.checkpoint import CheckpointFolder
from longvideo.training.engine import LocalEngine
from longvideo.training.objective import Objective
from longvideo.training.optimizer import OptimizerConfig
from longvideo.vae.config import AutoencoderConfig
from tests import golden
from tests.checkpoint import official, small
from tests.checkpoint.random_weights import UMT5_XXL, random_model

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return official.save(tmp_path_factory.mktemp("models") / "ours")


@pytest.fixture(scope="module")
def wan(ours: ModelFolder) -> Path:
    folder = ours.path.parent / "wan"
    convert_model(ours, folder, ConversionOptions("official"))
    return folder


def test_the_official_folder_opens_by_content_whatever_its_files_are_called(
    ours: ModelFolder, wan: Path, tmp_path: Path
) -> None:
    renamed = tmp_path / "renamed"
    shutil.copytree(wan, renamed)
    (renamed / "Wan2.2_VAE.pth").rename(renamed / "a.bin")
    (renamed / "models_t5_umt5-xxl-enc-bf16.pth").rename(renamed / "b.pt")
    (renamed / "diffusion_pytorch_model.safetensors").rename(renamed / "c.safetensors")
    for folder in (wan, renamed):
        opened = ModelFolder.open(folder)
        assert opened.format == "official Wan folder"
        assert opened.parts == ("transformer", "vae", "text_encoder") and not opened.missing
        assert opened.transformer_config.num_attention_heads == 1
        assert (opened.vae_config, opened.text_encoder_config) == (ours.vae_config, ours.text_encoder_config)
        for part in opened.parts:
            opened.check(part)
        features = [model.load_text_encoder().encode(["a red ball"])[0] for model in (ours, opened)]
        assert torch.equal(*features)


def test_sizes_of_the_5b_follow_from_shapes_alone(tmp_path: Path) -> None:
    config, vae = MODELS["wan2.2-ti2v-5b"], AutoencoderConfig.wan22()
    model = random_model(config, vae, UMT5_XXL, settings=small.SETTINGS, tokenizer=tmp_path)
    assert shapes.transformer_config(model.weights("transformer"), text_len=512) == config
    assert shapes.autoencoder_config(model.weights("vae")) == vae
    assert shapes.text_encoder_config(model.weights("text_encoder")) == UMT5_XXL


def wrapped(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor.bfloat16() for name, tensor in official.transformer(5).state_dict().items()}


@pytest.mark.parametrize(
    ("content", "entry"),
    [
        ({"generator": wrapped("model."), "step": 3}, None),
        ({"generator_ema": wrapped("model._fsdp_wrapped_module."), "generator": wrapped("x")}, "generator_ema"),
        ({"model": wrapped(""), "critic": wrapped("model.")}, None),
        (wrapped("module.model."), None),
    ],
)
def test_checkpoints_of_longlive_open_in_all_their_wrappings(
    content: dict[str, object], entry: str | None, wan: Path, tmp_path: Path
) -> None:
    file = tmp_path / "model_bf16.pt"
    torch.save(content, file)
    alone = ModelFolder.open(file, entry=entry)
    assert alone.parts == ("transformer",) and alone.missing == ("vae", "text_encoder")
    whole = ModelFolder.open(file, base=wan, entry=entry)
    assert whole.parts == ("transformer", "vae", "text_encoder")
    state = whole.load_transformer().state_dict()
    assert all(torch.equal(state[name], x.bfloat16()) for name, x in official.transformer(5).state_dict().items())
    if "step" in content:
        assert alone.notes["step"] == "3" and alone.format == "LongLive 2.0 checkpoint"


def test_the_published_model_comes_with_its_settings(tmp_path: Path) -> None:
    model = random_model(
        MODELS["wan2.2-ti2v-5b"], AutoencoderConfig.wan22(), UMT5_XXL, settings=ModelSettings(), tokenizer=tmp_path
    )
    own = model.weights("transformer").renamed(lambda name: f"model.{name}")
    pickle_file.write_structure(tmp_path / "model_bf16.pt", own, within=("generator",))
    opened = ModelFolder.open(tmp_path / "model_bf16.pt")
    settings = opened.settings
    assert settings == PRESETS["longlive-2.0-5b"] and opened.transformer_config == MODELS["wan2.2-ti2v-5b"]
    assert (settings.shift, settings.steps, settings.guidance) == (5.0, 4, 1.0)
    assert (settings.window_frames, settings.sink_frames, settings.offset_per_shot) == (32, 8, 8) and settings.pin_shots
    assert ModelFolder.open(tmp_path / "model_bf16.pt", preset="wan2.2-ti2v-5b").settings.steps == 50


@torch.no_grad()
def test_the_references_packed_file_gives_its_flow(tmp_path: Path) -> None:
    base, spec, case = golden.model(), golden.spec(), golden.load("training_a") | golden.load("packed_a_forward")
    settings = ModelSettings(text_len=base.config.text_len)
    folder = ModelFolder.save(tmp_path / "base", settings=settings, transformer=base)
    original = golden.packed()
    save_file(original, tmp_path / "packed_a.safetensors")
    opened = ModelFolder.open(tmp_path / "packed_a.safetensors", base=folder.path)
    assert opened.is_packed and opened.format == "LongLive 2.0 checkpoint, packed in 4 bits"
    convert_model(opened, tmp_path / "packed.pt", ConversionOptions("longlive"))
    convert_model(opened, tmp_path / "ours", ConversionOptions())
    layout = TokenLayout.block_causal(spec, case["timestep"].shape[0] // spec.chunk_frames)
    flows = []
    for model_folder in (
        opened,
        ModelFolder.open(tmp_path / "packed.pt", base=folder.path),
        ModelFolder.open(tmp_path / "ours"),
    ):
        model = model_folder.load_transformer()
        set_product(model, W4A16(reference))
        text, sigma = model.encode_text(case["text"]), case["timestep"].unsqueeze(0) / 1000
        flow = model(case["noisy"].unsqueeze(0), sigma, text, rope=model.rope(layout), attention=Masked(layout))
        flows.append(golden.relative_error(flow[0], case["w4a16_block_causal_flow"]))
    assert max(flows) < TOLERANCE
    written = torch.load(tmp_path / "packed.pt", weights_only=True)["generator"]
    assert original.keys() == written.keys()
    for name, tensor in original.items():
        if name.endswith("amax"):
            assert torch.allclose(written[name], tensor, rtol=2e-7, atol=0)
        else:
            assert torch.equal(written[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.blocks.1.ffn.0.lora_A.weight",
        "base_model.model.blocks.1.ffn.0.lora_A.default.weight",
        "model.base_model.model.blocks.1._fsdp_wrapped_module.ffn.0.lora_A.weight",
        "transformer.blocks.1.ffn.net.0.proj.lora_A.weight",
        "blocks.1.ffn.0.lora_A.weight",
    ],
)
def test_low_rank_weights_are_known_by_anyones_names(name: str) -> None:
    pair = {name: torch.ones(4, 128), name.replace("lora_A", "lora_B"): torch.ones(64, 4)}
    adapter = open_adapter(Weights.of(pair))
    assert {layer: update.shape for layer, update in adapter.low_rank.items()} == {"blocks.1.ffn.0": (64, 128)}


def test_a_lora_of_longlive_is_added_and_goes_out_to_peft_and_diffusers(ours: ModelFolder, tmp_path: Path) -> None:
    sizes = layer_sizes(official.transformer())
    torch.manual_seed(1)
    weights = {
        f"base_model.model.{layer}.{name}.weight": torch.randn(*shape) / 8
        for layer, (rows, columns) in sizes.items()
        for name, shape in (("lora_A", (4, columns)), ("lora_B", (rows, 4)))
    }
    file = tmp_path / "lora.pt"
    torch.save({"generator_lora": weights, "critic_lora": weights, "step": 9}, file)
    stored = recognize(file)
    assert stored.format == "LongLive 2.0 LoRA" and stored.adapter is not None and stored.adapter.ranks == [4]
    with pytest.raises(CheckpointError, match="is a LoRA; use --base with the model that it belongs to"):
        ModelFolder.open(file)
    with pytest.raises(CheckpointError, match="generator_ema"):
        ModelFolder.open(file, base=ours.path, entry="generator_ema")
    merged = ModelFolder.open(file, base=ours.path).load_transformer().state_dict()
    name = "blocks.1.ffn.0"
    update = weights[f"base_model.model.{name}.lora_B.weight"] @ weights[f"base_model.model.{name}.lora_A.weight"]
    expected = official.transformer().state_dict()[f"{name}.weight"] + update
    assert torch.allclose(merged[f"{name}.weight"], expected, atol=1e-6)
    convert_adapter(file, tmp_path / "lora", base="ours")
    for source in (tmp_path / "lora", tmp_path / "lora" / "pytorch_lora_weights.safetensors"):
        again = ModelFolder.open(source, base=ours.path).load_transformer().state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in merged.items())
    packed = tmp_path / "packed"
    convert_model(ours, packed, ConversionOptions(precision="nvfp4"))
    convert_model(ModelFolder.open(file, base=packed), tmp_path / "merged", ConversionOptions())
    unpacked = ModelFolder.open(tmp_path / "merged").load_transformer().state_dict()
    assert 0.05 < golden.relative_error(unpacked[f"{name}.weight"], expected) < 0.1


def test_every_part_opens_with_the_names_of_training_wrappers(ours: ModelFolder, wan: Path, tmp_path: Path) -> None:
    def wrapped(name: str) -> str:
        first, *rest = name.split(".")
        inner = ".".join([first, *rest[:1], "_fsdp_wrapped_module._checkpoint_wrapped_module", *rest[1:]])
        return f"module._orig_mod.{inner}"

    for part, file in (
        ("transformer", "diffusion_pytorch_model.safetensors"),
        ("vae", "Wan2.2_VAE.pth"),
        ("text_encoder", "models_t5_umt5-xxl-enc-bf16.pth"),
    ):
        official_names = open_weights(wan / file)
        tensors = {wrapped(name): official_names.read(name) for name in official_names.infos}
        torch.save(tensors, tmp_path / f"{part}.pt")
        opened, plain = ModelFolder.open(tmp_path / f"{part}.pt", base=ours.path), ours.weights(part)
        opened.check(part)
        assert opened.weights(part).infos.keys() == plain.infos.keys()
        assert all(torch.equal(opened.weights(part).read(name), plain.read(name)) for name in plain.infos)


def save_run_checkpoint(folder: Path, *, trained: dict[str, Tensor], averaged: dict[str, Tensor]) -> None:
    """Write step 4 of a run that trains a transformer."""
    objective = Objective()
    objective.transformer = official.transformer()
    objective.transformer.load_state_dict(trained)
    engine = LocalEngine(objective, OptimizerConfig(), precision="fp32", device=torch.device("cpu"), ema_decay=0.9)
    for name, tensor in averaged.items():
        engine.ema.put(f"transformer.{name}", tensor)
    CheckpointFolder(folder, keep=1).save(4, engine, {})


def test_checkpoints_of_our_runs_open_with_their_average(ours: ModelFolder, tmp_path: Path) -> None:
    own, other = official.transformer(1).state_dict(), official.transformer(2).state_dict()
    alone, many, today = (tmp_path / name / "checkpoints" / "step_0000004" for name in ("alone", "many", "today"))
    for folder in (alone, many):
        folder.mkdir(parents=True)
        (folder / "state.json").write_text('{"step": 4}')
    save_run_checkpoint(today.parent, trained=other, averaged=own)
    for folder in (alone, many, today):
        shutil.copytree(ours.path, folder.parent.parent / "model")
    save_file({f"transformer.{name}": x for name, x in own.items()}, alone / "ema.safetensors")
    save_file({f"transformer.{name}": x for name, x in other.items()}, alone / "weights.safetensors")
    for rank in range(2):
        kinds = {"average": own, "weight": other, "exp_avg": other}
        save_file(
            {f"transformer.{name}/{k}": x.clone() for k, s in kinds.items() for name, x in list(s.items())[rank::2]},
            many / f"rank_{rank:05d}.safetensors",
        )
    for folder in (alone, many, today):
        averaged, trained = (ModelFolder.open(folder, entry=entry) for entry in (None, "weights"))
        assert averaged.parts == ("transformer", "vae", "text_encoder") and averaged.notes["step"] == "4"
        assert averaged.settings == ours.settings
        for opened, expected in ((averaged, own), (trained, other)):
            state = opened.load_transformer().state_dict()
            assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
        with pytest.raises(CheckpointError, match="has no entry 'generator'; use ema or weights"):
            ModelFolder.open(folder, entry="generator")
    file = today / "ema_00000_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 4
    file.write_bytes(data)
    ModelFolder.open(today, entry="weights")
    with pytest.raises(CheckpointError, match=f"{file} has changed since it was written"):
        ModelFolder.open(today)


@torch.no_grad()
def test_models_of_diffusers_and_transformers_go_through_every_format_with_equal_outputs(
    ours: ModelFolder, tmp_path: Path
) -> None:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(3)
    sizes = {key: value for key, value in asdict(official.TRANSFORMER).items() if key != "text_len"}
    transformer = WanTransformer3DModel(**sizes).eval()
    vae = AutoencoderKLWan(**{k: v for k, v in official.VAE.to_dict().items() if not k.startswith("_")}).eval()
    text_config = ours.text_encoder_config
    text_encoder = UMT5EncoderModel(UMT5Config(**{**text_config.to_dict(), "is_encoder_decoder": False})).eval()
    original = tmp_path / "original"
    shutil.copytree(ours.path, original)
    for part, module in (("transformer", transformer), ("vae", vae), ("text_encoder", text_encoder)):
        shutil.rmtree(original / part)
        module.save_pretrained(original / part)
    source = original
    for number, target in enumerate(("longvideo", "official", "longvideo", "diffusers")):
        convert_model(ModelFolder.open(source), tmp_path / str(number), ConversionOptions(target))
        source = tmp_path / str(number)
    back = (
        WanTransformer3DModel.from_pretrained(source, subfolder="transformer"),
        AutoencoderKLWan.from_pretrained(source, subfolder="vae"),
        UMT5EncoderModel.from_pretrained(source / "text_encoder"),
    )
    for before, after in zip((transformer, vae, text_encoder), back, strict=True):
        state = before.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in after.state_dict().items())
    opened, latents = ModelFolder.open(tmp_path / "1"), torch.randn(1, 48, 8, 4, 6)
    features = torch.randn(1, small.SETTINGS.text_len, 128)
    model = opened.load_transformer()
    layout = TokenLayout.block_causal(ours.spec, 1)
    flow = model(
        latents, torch.full((1, 8), 0.7), model.encode_text(features), rope=model.rope(layout), attention=Full()
    )
    expected = transformer(latents, torch.tensor([700.0]), features, return_dict=False)[0]
    assert golden.relative_error(flow, expected) < TOLERANCE
    video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    moments, _ = opened.load_vae().encode(video)
    assert golden.relative_error(moments, vae.encode(video, return_dict=False)[0].parameters) < TOLERANCE
    frames, _ = opened.load_vae().decode(moments[:, :48])
    assert golden.relative_error(frames.clamp(-1, 1), vae.decode(moments[:, :48], return_dict=False)[0]) < TOLERANCE
    ids = torch.tensor([[3, 4, 5, 1]])
    mine = opened.load_text_encoder().model(ids, torch.ones_like(ids))
    assert golden.relative_error(mine, text_encoder(ids).last_hidden_state) < TOLERANCE


@pytest.mark.parametrize(
    ("change", "scaling"),
    [({}, 2.0), ({"use_rslora": True}, 4.0), ({"lora_alpha": 3}, 0.75)],
)
def test_the_scaling_of_an_update_is_that_of_its_configuration(
    change: dict[str, object], scaling: float, tmp_path: Path
) -> None:
    layer = "blocks.1.ffn.0"
    pair = {f"base_model.model.{layer}.lora_A.weight": torch.ones(4, 128)}
    pair |= {f"base_model.model.{layer}.lora_B.weight": torch.ones(64, 4)}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **change}
    save_file(pair, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    save_file(pair, tmp_path / "with_metadata.safetensors", metadata=header)
    for source in (tmp_path, tmp_path / "with_metadata.safetensors"):
        adapter = recognize(source).adapter
        assert adapter is not None and adapter.scales == [scaling]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 0}, "has r=0"),
        ({"lora_alpha": float("inf")}, "has lora_alpha=inf"),
        ({"use_qalora": True}, "has use_qalora=True"),
        ({"alpha_pattern": 3}, "has alpha_pattern=3"),
        ({"alpha_pattern": {"(a+)+": 3}}, r"alpha_pattern has '\(a\+\)\+'; expected the name of a layer"),
        ({"rank_pattern": {"[": 3}}, r"rank_pattern has '\['; expected the name of a layer"),
        ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights='pissa_niter_4', which changes the base"),
    ],
)
def test_an_adapter_that_would_be_added_wrongly_is_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    save_file({"blocks.0.ffn.0.lora_A.weight": torch.ones(4, 8)}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **change}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        recognize(tmp_path)


def test_a_file_of_another_depth_opens_with_a_base_of_its_width(ours: ModelFolder, tmp_path: Path) -> None:
    deeper = replace(official.TRANSFORMER, num_layers=3)
    save_file(CausalTransformer(deeper).state_dict(), tmp_path / "deeper.safetensors")
    opened = ModelFolder.open(tmp_path / "deeper.safetensors", base=ours.path)
    assert opened.transformer_config == deeper
    opened.check("transformer")


def test_a_plain_diffusers_folder_takes_the_settings_of_its_base(ours: ModelFolder, tmp_path: Path) -> None:
    convert_model(ours, tmp_path / "plain", ConversionOptions("diffusers"))
    assert ModelFolder.open(tmp_path / "plain", base=ours.path).settings == ours.settings
