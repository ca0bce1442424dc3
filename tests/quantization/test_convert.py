"""The layers that are packed, and packed models on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.modules import OnMeta
from longvideo.checkpoint.settings import ModelSettings
from longvideo.errors import CheckpointError, UserError
from longvideo.kernels.nvfp4 import reference
from longvideo.kernels.nvfp4.format import Rule
from longvideo.model.config import PRESETS
from longvideo.model.transformer import Block, CausalTransformer, ModulatedNorm
from longvideo.quantization.convert import (
    expect_packed,
    layers_to_quantize,
    quantize_layers,
    set_inputs,
    set_product,
    with_precision,
)
from longvideo.quantization.linear import NVFP4Linear, RoundedGELU, RoundedModulatedNorm
from longvideo.quantization.products import W4A16, EmulatedW4A4, choose_w4a4
from tests.golden import relative_error
from tests.quantization import small

CPU = torch.device("cpu")
WEIGHTS = Path("transformer/diffusion_pytorch_model.safetensors")


def test_all_linear_layers_of_the_blocks_and_nothing_else() -> None:
    names = layers_to_quantize(small.model())
    assert len(names) == 10 * small.CONFIG.num_layers and all(name.startswith("blocks.") for name in names)


def test_patterns_keep_layers() -> None:
    names = layers_to_quantize(small.model(), ["blocks.0.*", "*.ffn.2"])
    assert len(names) == 9 * (small.CONFIG.num_layers - 1)
    with pytest.raises(UserError, match=r"'blocks.0.selfattn.q' matches no linear layer .* 'blocks.0.self_attn.q'"):
        layers_to_quantize(small.model(), ["blocks.0.selfattn.q"])


def test_inputs_are_rounded_once_by_what_comes_before_and_only_for_packed_layers() -> None:
    model = small.model()
    quantize_layers(model, keep=["blocks.0.self_attn.v", "blocks.0.ffn.2"])
    set_product(model, choose_w4a4(CPU))
    first, second = (block for block in list(model.blocks)[:2])
    assert isinstance(first, Block) and isinstance(second, Block)
    assert isinstance(first.norm1, ModulatedNorm), "a layer that is not packed needs the input itself"
    assert isinstance(first.norm2, RoundedModulatedNorm) and isinstance(first.ffn[1], torch.nn.GELU)
    assert isinstance(second.norm1, RoundedModulatedNorm) and isinstance(second.ffn[1], RoundedGELU)
    before = small.velocity(model)
    set_inputs(model, None)
    assert isinstance(second.norm1, ModulatedNorm)
    torch.testing.assert_close(small.velocity(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("rule", [Rule.STATIC6, Rule.ADAPTIVE])
def test_quantized_velocity_is_near_the_exact_one(rule: Rule) -> None:
    model = small.model()
    exact = small.velocity(model)
    quantize_layers(model, rule)
    set_product(model, W4A16(reference))
    weights_only = relative_error(small.velocity(model), exact)
    set_product(model, choose_w4a4(CPU, rule))
    both = relative_error(small.velocity(model), exact)
    assert 0 < weights_only < both < 0.2


def saved(folder: Path, *, shard_bytes: int = 2**30) -> ModelFolder:
    model = small.model()
    quantize_layers(model, keep=["blocks.1.ffn.*"])
    settings = ModelSettings(text_len=small.CONFIG.text_len)
    return ModelFolder.save(
        folder, settings=settings, transformer=model, dtype=torch.bfloat16, max_shard_bytes=shard_bytes
    )


@pytest.mark.parametrize("shard_bytes", [2**30, 6000])
def test_a_packed_folder_reads_back_bit_for_bit(tmp_path: Path, shard_bytes: int) -> None:
    folder = saved(tmp_path / "model", shard_bytes=shard_bytes)
    model, loaded = small.model(), folder.load_transformer()
    quantize_layers(model, keep=["blocks.1.ffn.*"])
    assert folder.is_packed
    for name, expected in model.state_dict().items():
        got = loaded.state_dict()[name]
        packed = name.rpartition(".")[2].startswith("weight_")
        assert got.dtype == (expected.dtype if packed else torch.bfloat16), name
        assert torch.equal(got.float(), (expected if packed else expected.bfloat16()).float()), name
    assert isinstance(loaded.get_submodule("blocks.0.ffn.0"), NVFP4Linear)
    assert isinstance(loaded.get_submodule("blocks.1.ffn.0"), torch.nn.Linear)
    set_product(loaded, choose_w4a4(CPU))
    assert torch.isfinite(small.velocity(loaded)).all()


def test_diffusers_refuses_a_packed_folder(tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    saved(tmp_path / "model")
    with pytest.raises(ValueError, match="longvideo_nvfp4"):
        WanTransformer3DModel.from_pretrained(tmp_path / "model" / "transformer")


def test_another_convention_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    file = folder.path / WEIGHTS
    tensors = load_file(file)
    for metadata in ({"format": "pt"}, {"format": "pt", "nvfp4_convention": "2: high nibble first"}):
        save_file(tensors, file, metadata=metadata)
        with pytest.raises(CheckpointError, match="packed with the convention"):
            ModelFolder.open(folder.path).load_transformer()


def test_a_truncated_packed_file_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    file = folder.path / WEIGHTS
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="truncated"):
        ModelFolder.open(folder.path)


@pytest.mark.parametrize("leaf", ["weight_codes", "weight_scales", "weight_tensor_scale"])
def test_a_packed_layer_without_one_of_its_tensors_is_refused(tmp_path: Path, leaf: str) -> None:
    folder = saved(tmp_path / "model")
    file = folder.path / WEIGHTS
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(file)
    del tensors[f"blocks.0.attn1.to_q.{leaf}"]
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(CheckpointError, match="blocks.0.self_attn.q.weight"):
        ModelFolder.open(folder.path).load_transformer()


def test_the_backend_that_can_run_is_chosen_and_the_other_gives_the_reason() -> None:
    assert isinstance(choose_w4a4(CPU), EmulatedW4A4)
    with pytest.raises(ValueError, match="backend torch cannot run on cpu: FP4 products need a CUDA GPU"):
        choose_w4a4(CPU, backend="torch")
    with pytest.raises(ValueError, match="backend te cannot run on cpu: .*; use torch or emulated$"):
        choose_w4a4(CPU, backend="te")


def test_products_of_transformer_engine_are_refused_where_they_cannot_run_before_a_layer_is_packed() -> None:
    model = small.model()
    with pytest.raises(UserError, match=r"transformer_engine|FP4 products need.*; or use --precision nvfp4$"):
        with_precision(model, "nvfp4-te")
    assert not any(isinstance(module, NVFP4Linear) for module in model.modules())


def test_five_billion_parameters_pack_into_three_gigabytes() -> None:
    with OnMeta():
        model = CausalTransformer(PRESETS["wan2.2-ti2v-5b"])
    names = layers_to_quantize(model)
    assert len(names) == 300
    expect_packed(model, [f"{name}.weight_codes" for name in names])
    packed = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    rest = sum(parameter.numel() * 2 for parameter in model.parameters())
    assert packed + rest <= 3.0e9
