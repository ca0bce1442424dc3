"""A transformer whose weights are in host memory computes the bits of one whose weights are on the device."""

from __future__ import annotations

from threading import Thread

import pytest
import torch
from torch import Tensor, nn

from longvideo.kernels.backends import AttentionPrecision, TransformerPrecision
from longvideo.model.transformer import CausalTransformer
from longvideo.quantization.linear import NVFP4Linear
from longvideo.quantization.offloading import HostWeights, offload_blocks, offloaded_bytes
from longvideo.rollout import CachedTransformer
from longvideo.streaming.transformer import StreamingTransformer
from tests.streaming.test_transformer import SPEC, roll_out, transformer

CPU = torch.device("cpu")
FORMATS: list[tuple[TransformerPrecision, AttentionPrecision]] = [
    ("bf16", "bf16"),
    ("nvfp4-weights", "bf16"),
    ("nvfp4", "bf16"),
    ("fp8-emulated", "fp8-emulated"),
]


def offloaded(precision: TransformerPrecision, device: torch.device = CPU) -> CausalTransformer:
    model = transformer(precision, str(device), torch.float32 if device == CPU else torch.bfloat16)
    offload_blocks(model, device)
    return model


@pytest.mark.parametrize("clean_pass", [True, False])
@pytest.mark.parametrize(("precision", "attention"), FORMATS)
def test_a_rollout_has_the_same_bits(
    precision: TransformerPrecision, attention: AttentionPrecision, clean_pass: bool
) -> None:
    results = []
    for model in (transformer(precision, "cpu", torch.float32), offloaded(precision)):
        streaming = StreamingTransformer(model, SPEC, batch=1, attention=attention)
        results.append(roll_out(streaming, model, clean_pass=clean_pass))
        streaming.reset()
        assert torch.equal(roll_out(streaming, model, clean_pass=clean_pass), results[-1])
    assert torch.equal(*results)


def test_the_plain_path_has_the_same_bits() -> None:
    results = [
        roll_out(CachedTransformer(model, SPEC, batch=1), model)
        for model in (transformer("bf16", "cpu", torch.float32), offloaded("bf16"))
    ]
    assert torch.equal(*results)


def test_a_branch_of_a_packed_layer_is_moved_with_it() -> None:
    results = []
    for moves in (False, True):
        model = transformer("nvfp4-weights", "cpu", torch.float32)
        layer = model.get_submodule("blocks.1.ffn.0")
        assert isinstance(layer, NVFP4Linear)
        draws = torch.Generator().manual_seed(0)
        layer.add_branch(*(torch.randn(size, generator=draws) for size in ((4, 64), (96, 4))))
        if moves:
            offload_blocks(model, CPU)
        results.append(roll_out(StreamingTransformer(model, SPEC, batch=1), model))
    assert torch.equal(*results)
    plain = offloaded("nvfp4-weights")
    assert not torch.equal(results[0], roll_out(StreamingTransformer(plain, SPEC, batch=1), plain))


def test_the_device_holds_two_blocks_and_what_is_not_a_matrix() -> None:
    model, own = offloaded("bf16"), transformer("bf16", "cpu", torch.float32)
    StreamingTransformer(model, SPEC, batch=1)  # stores q, k and v side by side, which they are
    StreamingTransformer(model, SPEC, batch=1)
    storages: dict[int, int] = {}
    for parameter in model.blocks.parameters():
        storage = parameter.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    block = own.blocks[0]
    matrices = offloaded_bytes(block.parameters())
    others = sum(x.numel() * x.element_size() for x in block.parameters() if x.ndim != 2)
    assert sum(storages.values()) == 2 * matrices + len(own.blocks) * others
    assert matrices > 10 * others


def test_threads_take_turns() -> None:
    model, results = offloaded("bf16"), {}

    def run(number: int) -> None:
        results[number] = roll_out(StreamingTransformer(model, SPEC, batch=1), model)

    threads = [Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(results[0], results[1])
    resident = transformer("bf16", "cpu", torch.float32)
    assert torch.equal(results[0], roll_out(StreamingTransformer(resident, SPEC, batch=1), resident))


def test_an_error_in_a_pass_does_not_block_the_next_one() -> None:
    model = offloaded("bf16")
    with pytest.raises(RuntimeError, match="in a block"), model.in_turn() as blocks:
        next(blocks)
        raise RuntimeError("in a block")
    with model.in_turn() as blocks:
        assert len(list(blocks)) == len(model.blocks)


def test_blocks_of_different_sizes_keep_their_values() -> None:
    blocks = [nn.Sequential(nn.Linear(3, width), nn.Linear(width, 5, bias=False)) for width in (7, 2, 11, 1)]
    expected = [[x.detach().clone() for x in block.parameters()] for block in blocks]
    weights = HostWeights(blocks, CPU)  # pyright: ignore[reportArgumentType]
    for _ in range(2):
        with weights.in_turn(blocks) as loaded:  # pyright: ignore[reportArgumentType]
            for block, own in zip(loaded, expected, strict=True):
                assert _equal(list(block.parameters()), own)


def _equal(tensors: list[nn.Parameter], expected: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "nvfp4-weights", "nvfp4", "fp8"])
def test_a_gpu_gives_the_same_bits(precision: TransformerPrecision) -> None:
    device, results = torch.device("cuda"), []
    for model in (transformer(precision, "cuda", torch.bfloat16), offloaded(precision, device)):
        streaming = StreamingTransformer(model, SPEC, batch=1)
        streaming.warm_up()
        results.append(roll_out(streaming, model))
    assert torch.equal(*results)
