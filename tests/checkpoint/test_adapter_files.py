"""Adapters in every naming add what they state; damaged ones are refused by the name of the layer or tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from longvideo.checkpoint import names
from longvideo.checkpoint.adapter_files import open_adapter
from longvideo.checkpoint.adapters import Adapter, layer_sizes
from longvideo.checkpoint.choices import AdapterChoice
from longvideo.checkpoint.chosen_adapters import open_choice
from longvideo.checkpoint.conversion import convert_adapter
from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.tensors import Weights
from longvideo.checkpoint.updates import merged
from longvideo.cli.main import main
from longvideo.errors import CheckpointError, UserError
from longvideo.model.attention import Full
from longvideo.model.layout import TokenLayout
from longvideo.model.transformer import CausalTransformer
from tests.checkpoint import official

if TYPE_CHECKING:
    from longvideo.model.spec import ChunkSpec

LAYERS = ("blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.1.ffn.2", "text_embedding.0", "head.head")
RANK, ALPHA = 4, 2.0
BF16_ROUNDOFF, FP32_ROUNDOFF = 2.0**-8, 2.0**-22


@cache
def base_weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in official.transformer().state_dict().items()}


@cache
def pairs(seed: int = 1, rank: int = RANK) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the factors of updates by layer, each as large as the weight."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: base_weights()[f"{name}.weight"].shape for name in LAYERS}
    return {
        name: (torch.randn(rank, columns, generator=generator) / 8, torch.randn(rows, rank, generator=generator) / 8)
        for name, (rows, columns) in shapes.items()
    }


def kohya(name: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}"


def diffusers(name: str) -> str:
    return names.to_diffusers(f"{name}.weight").removesuffix(".weight")


def file_of(layer_name: Callable[[str], str], down: str, up: str, alpha: bool) -> Callable[[], dict[str, Tensor]]:
    def write() -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for layer, (narrow, wide) in pairs().items():
            tensors |= {f"{layer_name(layer)}.{down}": narrow, f"{layer_name(layer)}.{up}": wide}
            tensors |= {f"{layer_name(layer)}.alpha": torch.tensor(ALPHA)} if alpha else {}
        return tensors

    return write


AB, DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
NAMINGS = {
    "kohya and musubi": file_of(kohya, *DOWN_UP, True),
    "kohya, diffusers' layers": file_of(lambda name: kohya(diffusers(name)), *DOWN_UP, True),
    "ComfyUI": file_of(lambda name: f"diffusion_model.{name}", *AB, False),
    "ComfyUI with alpha": file_of(lambda name: f"diffusion_model.{name}", *AB, True),
    "lightx2v": file_of(lambda name: f"diffusion_model.{name}", *DOWN_UP, True),
    "nested prefixes": file_of(lambda name: f"model.diffusion_model.{name}", *DOWN_UP, True),
    "diffusers": file_of(lambda name: f"transformer.{diffusers(name)}", *AB, False),
    "older diffusers": file_of(
        lambda name: f"transformer.{diffusers(name)}", "lora.down.weight", "lora.up.weight", False
    ),
    "peft's state of an adapter `style`": file_of(
        lambda name: f"base_model.model.{name}", "lora_A.style.weight", "lora_B.style.weight", False
    ),
    "OneTrainer": file_of(lambda name: kohya(name).replace("lora_unet_", "lora_transformer_"), *DOWN_UP, True),
    "DiffSynth's pipeline": file_of(lambda name: f"pipe.dit.{name}", *AB, False),
    "a model called unet": file_of(lambda name: f"unet.{diffusers(name)}", *AB, False),
    "bare": file_of(lambda name: name, *AB, False),
}


def check_rounding(result: Tensor, exact: Tensor, roundoff: float) -> None:
    """Compare with float64. roundoff: largest relative error of rounding to the dtype of the result."""
    error = (result.double() - exact).abs()
    assert (error <= roundoff * exact.abs() + FP32_ROUNDOFF * exact.abs().max()).all()


@pytest.mark.parametrize(("dtype", "roundoff"), [(torch.float32, 0.0), (torch.bfloat16, BF16_ROUNDOFF)])
@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_is_added_exactly(naming: str, dtype: torch.dtype, roundoff: float, tmp_path: Path) -> None:
    tensors = NAMINGS[naming]()
    save_file(tensors, tmp_path / "adapter.safetensors")
    adapter = open_choice(AdapterChoice.parse(f"{tmp_path / 'adapter.safetensors'}:0.75"))
    scale = ALPHA / RANK if any(name.endswith("alpha") for name in tensors) else 1.0
    assert adapter.scales == [scale] and adapter.ranks == [RANK]
    base = base_weights(dtype)
    result = merged(Weights.of(base), [adapter])
    assert result.infos.keys() == base.keys()
    for name, weight in base.items():
        update = pairs().get(name.removesuffix(".weight"))
        if update is None:
            assert torch.equal(result.read(name), weight)
        else:
            down, up = update
            exact = weight.double() + 0.75 * scale * (up.double() @ down.double())
            assert result.infos[name].dtype == dtype
            check_rounding(result.read(name), exact, roundoff)


def test_differences_of_weights_biases_norms_and_modulations_are_added(tmp_path: Path) -> None:
    base = base_weights()
    keys = {
        "blocks.0.self_attn.q.bias": "blocks.0.self_attn.q.diff_b",
        "blocks.0.norm3.weight": "blocks.0.norm3.diff",
        "blocks.1.self_attn.norm_q.weight": "blocks.1.self_attn.norm_q.diff",
        "blocks.1.modulation": "blocks.1.diff_m",
        "head.modulation": "head.diff_m",
        "patch_embedding.weight": "patch_embedding.diff",
    }
    changes = {name: torch.randn(base[name].shape) for name in keys}
    pair = {"blocks.0.self_attn.q.lora_down.weight": torch.randn(4, 128)}
    pair |= {"blocks.0.self_attn.q.lora_up.weight": torch.randn(128, 4)}
    tensors = {**{keys[name]: change for name, change in changes.items()}, **pair}
    save_file({f"diffusion_model.{name}": x for name, x in tensors.items()}, tmp_path / "x.safetensors")
    adapter = open_choice(AdapterChoice(str(tmp_path / "x.safetensors"), 0.5))
    result = merged(Weights.of(base), [adapter])
    for name, change in changes.items():
        torch.testing.assert_close(result.read(name), base[name] + 0.5 * change)
    product = pair["blocks.0.self_attn.q.lora_up.weight"] @ pair["blocks.0.self_attn.q.lora_down.weight"]
    expected = base["blocks.0.self_attn.q.weight"] + 0.5 * product
    torch.testing.assert_close(result.read("blocks.0.self_attn.q.weight"), expected)


def test_an_update_of_a_convolution_is_added(tmp_path: Path) -> None:
    weight = base_weights()["patch_embedding.weight"]
    down, up = torch.randn(4, *weight.shape[1:]), torch.randn(weight.shape[0], 4, 1, 1, 1)
    pair = {"lora_unet_patch_embedding.lora_down.weight": down, "lora_unet_patch_embedding.lora_up.weight": up}
    save_file(pair, tmp_path / "x.safetensors")
    result = merged(Weights.of(base_weights()), [open_choice(AdapterChoice(str(tmp_path / "x.safetensors")))])
    expected = weight + torch.einsum("or,rcthw->octhw", up[..., 0, 0, 0], down)
    torch.testing.assert_close(result.read("patch_embedding.weight"), expected)


PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "ranks and alphas by layer": {
        "rank_pattern": {r"blocks\.1\.ffn\.2": 3, "q": 5},
        "alpha_pattern": {"self_attn.q": 7, r"^blocks\.1\.ffn\.[02]": 2},
    },
    "rsLoRA": {"use_rslora": True, "rank_pattern": {"ffn.0": 9}},
    "DoRA": {"use_dora": True, "rank_pattern": {"k": 2}},
    "biases of lora_B": {"lora_bias": True, "target_modules": ["q", "ffn.0"]},
}


@pytest.mark.parametrize("kind", PEFT_CONFIGS)
def test_generation_with_an_adapter_of_peft_equals_pefts_own(kind: str, ours: ModelFolder, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel

    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q", "k", "o", "ffn.0", "ffn.2"], **PEFT_CONFIGS[kind]}
    model = PeftModel(official.transformer(), LoraConfig(**config), adapter_name="style")
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.rand(parameter.shape, generator=generator)
        elif "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"adapters in folders of their own, style; use .*/style"):
        open_choice(AdapterChoice(str(tmp_path)))
    for place in (tmp_path / "style", tmp_path / "style" / "adapter_model.safetensors"):
        loaded = ModelFolder.open(ours.path, adapters=[AdapterChoice(str(place))]).load_transformer(dtype=torch.float32)
        with torch.no_grad():
            expected, plain = velocity(model.get_base_model(), ours.spec), velocity(official.transformer(), ours.spec)
            assert (velocity(loaded, ours.spec) - expected).norm() / expected.norm() < 1e-5
        assert (plain - expected).norm() / expected.norm() > 1e-2
    merged_by_peft = model.merge_and_unload().state_dict()
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, merged_by_peft[name], rtol=1e-5, atol=1e-5)


def velocity(model: Any, spec: ChunkSpec) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(1, 48, 8, 4, 6, generator=generator)
    text = model.encode_text(torch.randn(1, official.TRANSFORMER.text_len, 128, generator=generator))
    sigma = torch.full((1, 8), 0.5)
    return model(latents, sigma, text, rope=model.rope(TokenLayout.block_causal(spec, 1)), attention=Full())


def test_an_adapter_saved_by_diffusers_equals_its_own_merge(tmp_path: Path) -> None:
    from diffusers import WanPipeline
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
    from peft import LoraConfig, get_peft_model_state_dict

    official.save(tmp_path / "model")
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "model" / "transformer")
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "net.0.proj"], alpha_pattern={"attn2.to_q": 9})
    theirs.add_adapter(config)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    WanPipeline.save_lora_weights(
        str(tmp_path / "lora"),
        transformer_lora_layers={**get_peft_model_state_dict(theirs)},
        transformer_lora_adapter_metadata=config.to_dict(),
    )
    folder = ModelFolder.open(tmp_path / "model", adapters=[AdapterChoice(str(tmp_path / "lora"))])
    assert folder.adapters[0].scales == [1.5, 2.25]
    theirs.fuse_lora()
    own = folder.load_transformer().state_dict()
    for name, tensor in theirs.state_dict().items():
        if "lora_" not in name:
            mine = own[names.to_official(name.replace(".base_layer", ""))]
            torch.testing.assert_close(mine, tensor.view(mine.shape), rtol=1e-5, atol=1e-6)


def test_two_adapters_are_added_in_their_order_with_their_strengths(ours: ModelFolder, tmp_path: Path) -> None:
    """As LongLive-Plug's two: many ranks at 1.0, and half as many at 0.5."""
    exact = {name: tensor.double() for name, tensor in base_weights().items()}
    for seed, (name, rank, strength) in enumerate([("few_steps.pt", 8, 1.0), ("guidance.pt", 4, 0.5)]):
        factors = pairs(seed, rank)
        tensors = {f"base_model.model.{x}.lora_A.weight": factors[x][0] for x in factors}
        tensors |= {f"base_model.model.{x}.lora_B.weight": factors[x][1] for x in factors}
        torch.save({"generator_lora": tensors, "critic_lora": {}, "step": 1}, tmp_path / name)
        for layer, (down, up) in factors.items():
            exact[f"{layer}.weight"] += strength * (up.double() @ down.double())
    words = ["--adapter", f"{tmp_path}/few_steps.pt", "--adapter", f"{tmp_path}/guidance.pt:0.5"]
    assert main(["convert", str(ours.path), str(tmp_path / "converted"), *words]) == 0
    assert main(["merge", str(ours.path), words[1], str(tmp_path / "merged"), *words[2:]]) == 0
    for result in ("converted", "merged"):
        state = ModelFolder.open(tmp_path / result).load_transformer().state_dict()
        for name, tensor in exact.items():
            check_rounding(state[name], tensor, 0.0)


def test_a_conversion_to_float32_keeps_the_sum_in_float32(ours: ModelFolder, tmp_path: Path) -> None:
    file, half = tmp_path / "adapter.safetensors", tmp_path / "bf16"
    save_file(NAMINGS["kohya and musubi"](), file)
    assert main(["convert", str(ours.path), str(half), "--precision", "bf16"]) == 0
    words = ["--adapter", str(file), "--precision", "fp32"]
    assert main(["convert", str(half), str(tmp_path / "whole"), *words]) == 0
    before, after = (ModelFolder.open(path).load_transformer().state_dict() for path in (half, tmp_path / "whole"))
    for layer, (down, up) in pairs().items():
        name = f"{layer}.weight"
        exact = before[name].double() + ALPHA / RANK * (up.double() @ down.double())
        assert after[name].dtype == torch.float32
        check_rounding(after[name], exact, 0.0)


def test_dora_depends_on_the_order_and_scales_its_change() -> None:
    weight, down, up = torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2)
    magnitude = torch.rand(6) + 1
    tensors = {"blocks.0.ffn.0.lora_A.weight": down, "blocks.0.ffn.0.lora_B.weight": up}
    tensors["blocks.0.ffn.0.lora_magnitude_vector"] = magnitude
    adapter = replace(open_adapter(Weights.of(tensors), scale=0.5), strength=0.25)
    result = merged(Weights.of({"blocks.0.ffn.0.weight": weight}), [adapter]).read("blocks.0.ffn.0.weight")
    whole = weight + 0.5 * up @ down
    expected = weight + 0.25 * (magnitude[:, None] * torch.nn.functional.normalize(whole, dim=1) - weight)
    torch.testing.assert_close(result, expected)


def without(ending: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: x for name, x in tensors.items() if not name.endswith(f"ffn_2.{ending}")}


def with_tensor(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {**tensors, name: tensor}


FFN = "lora_unet_blocks_1_ffn_2"
DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Mapping[str, Tensor]], str]] = {
    "no up": (without("lora_up.weight"), rf"{FFN}\.lora_down\.weight has no matching lora_B or lora_up"),
    "alpha alone": (
        with_tensor("lora_unet_blocks_0_ffn_0.alpha", torch.tensor(1.0)),
        r"lora_unet_blocks_0_ffn_0\.alpha has no matching lora_A or lora_down",
    ),
    "alpha NaN": (with_tensor(f"{FFN}.alpha", torch.tensor(math.nan)), rf"{FFN}\.alpha is nan; expected a number"),
    "alpha of two": (with_tensor(f"{FFN}.alpha", torch.ones(2)), rf"{FFN}\.alpha has shape \[2\]"),
    "two ranks": (with_tensor(f"{FFN}.lora_up.weight", torch.ones(128, 5)), r"has rank 4, but .* has rank 5"),
    "a vector": (with_tensor(f"{FFN}.lora_up.weight", torch.ones(128)), r"has shape \[128\]; expected a matrix"),
    "wrong size": (
        with_tensor(f"{FFN}.lora_up.weight", torch.ones(7, 4)),
        r"updates blocks\.1\.ffn\.2\.weight of shape \[7, 64\], but .* its shape is \[128, 64\]",
    ),
    "NaN": (
        with_tensor(f"{FFN}.lora_up.weight", torch.full((128, 4), math.nan)),
        r"the update of blocks\.1\.ffn\.2\.weight contains NaN or infinity",
    ),
    "another model": (
        lambda tensors: {name.replace("blocks_1", "blocks_7"): x for name, x in tensors.items()},
        r"updates blocks\.7\.cross_attn\.o\.weight, which is not in .*; use the model that it was trained on",
    ),
    "a text encoder": (
        with_tensor("lora_te_text_model.diff", torch.ones(3)),
        r"updates lora_te_text_model\.weight, which is not in",
    ),
    "LoHa": (with_tensor("lora_unet_x.hada_w1_a", torch.ones(3, 4)), r"hada_w1_a belongs to LoHa, which is not"),
    "unknown": (with_tensor("lora_unet_x.set_weight", torch.ones(3)), r"set_weight is not an update of a layer"),
    "twice": (
        with_tensor("blocks.1.ffn.2.lora_A.weight", torch.ones(4, 64)),
        r"'.*' and 'lora_unet_blocks_1_ffn_2\.lora_down\.weight' are both the lora_A of blocks\.1\.ffn\.2",
    ),
    "integers": (with_tensor(f"{FFN}.lora_up.weight", torch.ones(128, 4).int()), r"lora_up\.weight is torch\.int32"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_adapter_is_one_line_with_the_name(
    damage: str, ours: ModelFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = DAMAGE[damage]
    save_file(dict(change(NAMINGS["kohya and musubi"]())), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=message):
        ModelFolder.open(ours.path, adapters=[AdapterChoice(str(tmp_path / "x.safetensors"))]).load_transformer()
    command = ["convert", str(ours.path), str(tmp_path / "result"), "--adapter", str(tmp_path / "x.safetensors")]
    assert main(command) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "result").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora.pt", AdapterChoice("lora.pt", 1.0)),
        ("lora.pt:0.5", AdapterChoice("lora.pt", 0.5)),
        ("lora.pt:-1e-1", AdapterChoice("lora.pt", -0.1)),
        ("C:/lora.pt", AdapterChoice("C:/lora.pt", 1.0)),
        ("a:b:2", AdapterChoice("a:b", 2.0)),
        ("lora.pt:", AdapterChoice("lora.pt:", 1.0)),
    ],
)
def test_a_strength_is_the_number_after_the_last_colon(text: str, expected: AdapterChoice) -> None:
    assert AdapterChoice.parse(text) == expected


@pytest.mark.parametrize("text", ["", ":0.5", "lora.pt:nan", "lora.pt:1e999"])
def test_an_adapter_without_a_name_or_with_an_infinite_strength_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"has no name; use PATH|expected a finite number"):
        AdapterChoice.parse(text)


def test_a_model_is_not_an_adapter(ours: ModelFolder) -> None:
    with pytest.raises(CheckpointError, match=r"is not an adapter but a .*; use it as the model"):
        open_choice(AdapterChoice(str(ours.path)))


def test_ranks_and_scales_that_differ_become_one_for_peft(ours: ModelFolder, tmp_path: Path) -> None:
    sizes = {"blocks.0.self_attn.q": 3, "blocks.1.ffn.0": 5}
    shapes = layer_sizes(CausalTransformer(official.TRANSFORMER))
    tensors: dict[str, Tensor] = {}
    for layer, rank in sizes.items():
        rows, columns = shapes[layer]
        tensors |= {f"{kohya(layer)}.lora_down.weight": torch.randn(rank, columns)}
        tensors |= {f"{kohya(layer)}.lora_up.weight": torch.randn(rows, rank)}
        tensors |= {f"{kohya(layer)}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "x.safetensors")
    convert_adapter(tmp_path / "x.safetensors", tmp_path / "lora", base="ours")
    adapter = Adapter.load(tmp_path / "lora")
    assert (adapter.rank, adapter.scaling) == (5, 1.0)
    one, other = (
        ModelFolder.open(ours.path, adapters=[AdapterChoice(str(tmp_path / name))]).load_transformer().state_dict()
        for name in ("x.safetensors", "lora")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return official.save(tmp_path_factory.mktemp("model") / "ours")
