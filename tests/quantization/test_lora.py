"""LoRA through peft on a transformer with packed layers."""

from __future__ import annotations

import pytest
import torch

from longvideo.kernels.nvfp4 import reference
from longvideo.model.attention import Full
from longvideo.model.layout import TokenLayout
from longvideo.quantization.convert import quantize_layers, set_product
from longvideo.quantization.lora import LoraLinear, add_lora
from longvideo.quantization.products import EmulatedW4A4
from tests.quantization import small


def test_adapters_train_on_a_packed_backbone_and_switch_off() -> None:
    from peft import LoraConfig

    model = small.model()
    quantize_layers(model)
    set_product(model, EmulatedW4A4(reference))
    before = small.velocity(model)
    adapted = add_lora(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q", "k", "v", "o", "ffn.0", "ffn.2"]))
    assert sum(isinstance(module, LoraLinear) for module in model.modules()) == 10 * small.CONFIG.num_layers
    torch.testing.assert_close(small.velocity(model), before, rtol=0, atol=0)  # a new adapter adds zero
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name, p in adapted.named_parameters() if p.requires_grad)
    optimizer = torch.optim.Adam(trained, lr=0.01)
    losses = []
    for _ in range(10):
        layout = TokenLayout.block_causal(small.SPEC, 1)
        text = model.encode_text(small.features(1))
        sigma = torch.full((1, small.SPEC.chunk_frames), 0.5)
        flow = model(small.latents(1), sigma, text, rope=model.rope(layout), attention=Full())
        loss = (flow - 0.5 * before).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses
    assert not torch.equal(small.velocity(model), before)
    with adapted.disable_adapter():
        torch.testing.assert_close(small.velocity(model), before, rtol=0, atol=0)
    layer = next(module for module in model.modules() if isinstance(module, LoraLinear))
    with pytest.raises(ValueError, match="is not merged"):
        layer.merge()
