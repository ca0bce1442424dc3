"""Adapters on packed layers stay next to them, and generate as dequantized weights plus updates in plain torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from longvideo.checkpoint.choices import adapter_choices
from longvideo.checkpoint.conversion import ConversionOptions, convert_model
from longvideo.checkpoint.folder import ModelFolder
from longvideo.flow.unipc import UniPC
from longvideo.kernels.backends import AttentionPrecision, TransformerPrecision, norm_operations
from longvideo.kernels.nvfp4 import reference
from longvideo.model.cache import CACHES, CachePrecision
from longvideo.model.conditioning import Conditioning
from longvideo.model.transformer import Block, CausalTransformer
from longvideo.quantization.branch import LowRankBranch
from longvideo.quantization.convert import with_precision
from longvideo.quantization.linear import NVFP4Linear
from longvideo.quantization.products import InputPair
from longvideo.rollout import CachedTransformer, Denoiser, rollout
from longvideo.streaming.block import StreamingBlock
from longvideo.streaming.transformer import StreamingTransformer
from tests.golden import relative_error

KEPT = "blocks.0.ffn.2"
NUM_CHUNKS, STEPS = 2, 1


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return tiny in 4 bits, with one layer that is kept."""
    folder = tmp_path_factory.mktemp("packed") / "tiny"
    convert_model(ModelFolder.open("tiny"), folder, ConversionOptions(precision="nvfp4", keep=(KEPT,)))
    return folder


def save_adapter(file: Path, layers: Sequence[str], *, rank: int, biases: bool = False) -> Path:
    """Write an adapter of some layers of tiny in ComfyUI's naming. biases: whether it changes biases too."""
    model = ModelFolder.open("tiny").build("transformer")
    generator = torch.Generator().manual_seed(rank)
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        linear = model.get_submodule(layer)
        assert isinstance(linear, nn.Linear)
        down, up = (rank, linear.in_features), (linear.out_features, rank)
        tensors[f"diffusion_model.{layer}.lora_down.weight"] = 0.1 * torch.randn(down, generator=generator)
        tensors[f"diffusion_model.{layer}.lora_up.weight"] = 0.1 * torch.randn(up, generator=generator)
        tensors[f"diffusion_model.{layer}.alpha"] = torch.tensor(2.0)
        if biases:
            tensors[f"diffusion_model.{layer}.diff_b"] = 0.1 * torch.randn(linear.out_features, generator=generator)
    save_file(tensors, file)
    return file


def linear_layers() -> list[str]:
    model = ModelFolder.open("tiny").build("transformer")
    return [n for n, m in model.named_modules() if n.startswith("blocks.") and isinstance(m, nn.Linear)]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return an adapter of all layers with biases, and one of some layers, among them one of q, k and v."""
    folder = tmp_path_factory.mktemp("adapters")
    every = save_adapter(folder / "every.safetensors", linear_layers(), rank=4, biases=True)
    some = save_adapter(folder / "some.safetensors", ["blocks.1.self_attn.q", "blocks.0.ffn.0"], rank=3)
    return [f"{every}:0.5", f"{some}:-0.75"]


class Definition(nn.Module):
    """A packed layer with updates: dequantized weight, rounded input, and products with unrounded inputs, in torch."""

    def __init__(self, layer: NVFP4Linear, updates: Sequence[Tensor], *, rounds: bool) -> None:
        super().__init__()
        self.weight = reference.dequantize(layer.quantized_weight, torch.float32)
        self.bias, self.updates, self.rounds = layer.bias, updates, rounds

    def forward(self, x: Tensor) -> Tensor:
        rounded = reference.dequantize(reference.quantize(x), torch.float32) if self.rounds else x
        return F.linear(rounded, self.weight, self.bias) + sum(F.linear(x, update) for update in self.updates)


def defined(folder: ModelFolder, updates: Mapping[str, Sequence[Tensor]], *, rounds: bool) -> CausalTransformer:
    """Return the transformer with all packed layers replaced by their definition."""
    model = folder.load_transformer(dtype=torch.float32)
    for name, module in list(model.named_modules()):
        if isinstance(module, NVFP4Linear):
            model.set_submodule(name, Definition(module, updates.get(name, ()), rounds=rounds))
    return model


def updates_of(folder: ModelFolder) -> dict[str, list[Tensor]]:
    """Return the change of each layer's weight by every adapter, from the adapters' files."""
    from safetensors.torch import load_file

    changes: dict[str, list[Tensor]] = {}
    for adapter in folder.adapters:
        tensors = load_file(adapter.files[0])
        for name, up in tensors.items():
            if name.endswith(".lora_up.weight"):
                stem = name.removesuffix(".lora_up.weight")
                scale = tensors[f"{stem}.alpha"].item() / up.shape[1]
                update = adapter.strength * scale * (up @ tensors[f"{stem}.lora_down.weight"])
                changes.setdefault(stem.removeprefix("diffusion_model."), []).append(update)
    return changes


def latents(denoiser: Denoiser, model: CausalTransformer) -> Tensor:
    config = model.config
    features = torch.randn(2, config.text_len, config.text_dim, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        text = model.encode_text(features)
    chunks = [Conditioning(text, torch.tensor([number % 2]), None, cut=number == 1) for number in range(NUM_CHUNKS)]
    return torch.cat(
        list(rollout(denoiser, chunks, solver=UniPC(STEPS), generators=[torch.Generator().manual_seed(0)])), 2
    )


def both(
    model: CausalTransformer,
    folder: ModelFolder,
    *,
    kv_cache: CachePrecision = "bf16",
    attention: AttentionPrecision = "bf16",
) -> tuple[Tensor, Tensor]:
    cached = CachedTransformer(model, folder.spec, batch=1, cache_type=CACHES[kv_cache])
    streaming = StreamingTransformer(model, folder.spec, batch=1, kv_cache=kv_cache, attention=attention)
    return latents(cached, model), latents(streaming, model)


def opened(folder: Path, adapters: Sequence[str] = ()) -> ModelFolder:
    return ModelFolder.open(folder, adapters=adapter_choices(adapters))


def loaded(folder: ModelFolder, precision: TransformerPrecision) -> CausalTransformer:
    return with_precision(folder.load_transformer(dtype=torch.float32), precision, packed=True)


def test_generation_equals_the_definition(packed: Path, adapters: list[str]) -> None:
    folder = opened(packed, adapters)
    model, exact = loaded(folder, "nvfp4-weights"), defined(folder, updates_of(folder), rounds=False)
    expected = latents(CachedTransformer(exact, folder.spec, batch=1), exact)
    for result in both(model, folder):
        assert relative_error(result, expected) < 1e-5
    plain = opened(packed)
    assert relative_error(both(loaded(plain, "nvfp4-weights"), plain)[0], expected) > 0.1


def test_every_layer_with_rounded_inputs_equals_its_definition(packed: Path, adapters: list[str]) -> None:
    """Compared layer by layer, since another order of fp32 sums may round a value of a later input the other way."""
    folder = opened(packed, adapters)
    model, updates = loaded(folder, "nvfp4"), updates_of(folder)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, NVFP4Linear)}
    errors: dict[str, list[float]] = {name: [] for name in layers}

    def compare(name: str, layer: Any, args: tuple[Tensor | InputPair], output: Any) -> None:
        exact = args[0].exact if isinstance(args[0], InputPair) else args[0]
        expected = Definition(layer, updates[name], rounds=True)(exact)
        errors[name].append(relative_error(output, expected))

    for name, layer in layers.items():
        layer.register_forward_hook(partial(compare, name))
    both(model, folder)
    for name, of_layer in errors.items():
        # in both transformers; a layer of text runs once a video
        assert len(of_layer) >= 2 * (1 if ".cross_attn." in name else NUM_CHUNKS * STEPS), name
        assert max(of_layer) < 1e-5, name


@pytest.mark.parametrize("precision", ["nvfp4-weights", "nvfp4"])
def test_strength_0_gives_the_bits_without_an_adapter(
    packed: Path, adapters: list[str], precision: TransformerPrecision
) -> None:
    off = [f"{text.rpartition(':')[0]}:0" for text in adapters]
    plain, silent = opened(packed), opened(packed, off)
    expected, results = (both(loaded(folder, precision), folder) for folder in (plain, silent))
    for result, own in zip(results, expected, strict=True):
        assert torch.equal(result, own)


def test_several_adapters_are_one_branch_of_a_layer(packed: Path, adapters: list[str]) -> None:
    folder = opened(packed, adapters)
    model = folder.load_transformer()
    ranks = {
        name.removesuffix(".branch"): branch.get_buffer("down").shape[0]
        for name, branch in model.named_modules()
        if isinstance(branch, LowRankBranch)
    }
    assert ranks == folder.branches.ranks
    assert ranks["blocks.1.self_attn.q"] == ranks["blocks.0.ffn.0"] == 7
    assert set(ranks.values()) == {4, 7} and KEPT not in ranks
    assert isinstance(model.get_submodule(KEPT), nn.Linear)


def test_the_mean_of_values_is_projected_with_the_branch(packed: Path, adapters: list[str]) -> None:
    """Attention in FP8 subtracts a mean from the values, and adds its projection after the output layer."""
    folder = opened(packed, adapters)
    block = loaded(folder, "nvfp4-weights").blocks[1]
    assert isinstance(block, Block) and isinstance(layer := block.self_attn.o, NVFP4Linear)
    mean_NK = torch.randn(block.self_attn.num_heads, folder.transformer_config.attention_head_dim)
    streaming = StreamingBlock(block, norm_operations(torch.device("cpu")), eps=1e-6)
    weight = reference.dequantize(layer.quantized_weight, torch.float32)
    expected = (weight + sum(updates_of(folder)["blocks.1.self_attn.o"])) @ mean_NK.flatten()
    torch.testing.assert_close(streaming.project_mean(mean_NK, torch.float32), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv_cache", CACHES)
def test_a_branch_runs_with_every_cache_and_attention_in_fp8(
    packed: Path, adapters: list[str], kv_cache: CachePrecision
) -> None:
    folder = opened(packed, adapters)
    model = loaded(folder, "nvfp4-weights")
    exact, _ = both(model, folder)
    streaming = both(model, folder, kv_cache=kv_cache, attention="fp8-emulated")[1]
    assert 0 < relative_error(streaming, exact) < 0.25


def test_a_difference_and_dora_make_a_packed_layer_wide(
    packed: Path, adapters: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layer = "blocks.0.self_attn.o"
    whole = opened(packed).load_transformer().get_submodule(layer)
    assert isinstance(whole, NVFP4Linear)
    weight = reference.dequantize(whole.quantized_weight, torch.float32)
    difference = 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    save_file({f"diffusion_model.{layer}.diff": difference}, tmp_path / "diff.safetensors")
    folder = opened(packed, [*adapters, f"{tmp_path / 'diff.safetensors'}:2"])
    assert folder.branches.widened == (layer,)
    with caplog.at_level(logging.WARNING):
        model = folder.load_transformer(dtype=torch.float32)
    assert f"1 packed layers ({layer}) have updates that are not low-rank and become float32" in caplog.text
    expected = weight + sum(updates_of(opened(packed, adapters))[layer]) + 2 * difference
    torch.testing.assert_close(model.get_submodule(layer).weight, expected, rtol=0, atol=1e-6)
    assert isinstance(model.get_submodule("blocks.1.self_attn.o"), NVFP4Linear)
    assert torch.isfinite(both(with_precision(model, "nvfp4", packed=True), folder)[1]).all()


def test_conversion_adds_the_update_and_reports_layers_that_become_bf16(
    packed: Path, adapters: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        folder = opened(packed, adapters[1:])
        folder.load_transformer()
        assert caplog.text == ""
        convert_model(folder, tmp_path / "merged", ConversionOptions())
    assert "the 2 layers that the adapter updates become bf16; NVFP4 would" in caplog.text
    merged = opened(tmp_path / "merged").load_transformer()
    wide = {"blocks.1.self_attn.q", "blocks.0.ffn.0", KEPT}
    assert {name for name in linear_layers() if isinstance(merged.get_submodule(name), nn.Linear)} == wide


def test_other_adapters_replace_all_and_none_restores_the_base(packed: Path, adapters: list[str]) -> None:
    plain, first = opened(packed), opened(packed, adapters)
    restored = first.with_other_adapters([])
    assert restored.adapters == () and restored.weights("transformer").infos == plain.weights("transformer").infos
    own, expected = (folder.load_transformer().state_dict() for folder in (restored, plain))
    assert own.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(own[name], tensor), name
    swapped = first.with_other_adapters(opened(packed, adapters[1:]).adapters)
    assert swapped.branches.ranks == {"blocks.1.self_attn.q": 3, "blocks.0.ffn.0": 3}
