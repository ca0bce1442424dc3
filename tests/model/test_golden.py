"""The model equals the public reference to 1e-5 relative, in fp32."""

from __future__ import annotations

import pytest
import torch

from longvideo.model.attention import Cached, Filling, Masked
from longvideo.model.cache import KVCache
from longvideo.model.layout import TokenLayout
from tests import golden


@pytest.mark.parametrize("name", ["window", "multishot"])
@torch.no_grad()
def test_a_rollout_equals_the_reference(name: str) -> None:
    facts, case, model = golden.sizes()["rollouts"][name], golden.load(f"rollout_a_{name}"), golden.model()
    spec = golden.spec(multi_shot=facts["multi_shot"])
    cache = KVCache(model.cache_sizes(spec, batch=1))
    attention, shot = Cached(cache), 0
    for chunk in range(golden.sizes()["chunks"]):
        cut = chunk in facts["cuts"]
        shot += cut
        layout = TokenLayout.one_chunk(spec, chunk, shot=shot)
        text = model.encode_text(case[f"{chunk}.text"].unsqueeze(0))
        for call, timestep in enumerate(facts["timesteps"]):
            latents = case[f"{chunk}.{call}.latent"].unsqueeze(0)
            sigma = torch.full((1, spec.chunk_frames), timestep / 1000)
            flow = model(latents, sigma, text, rope=model.rope(layout), attention=attention)
            error = golden.relative_error(flow[0], case[f"{chunk}.{call}.flow"])
            assert error < golden.TOLERANCE, (chunk, call, error)
        # a second clean pass, which ends with the last keys and values, must not change the cache
        model.fill_cache(latents, sigma, text, rope=model.rope(layout), attention=Filling(cache))
        cache.commit(cut=cut)


@pytest.mark.parametrize("name", ["teacher_forcing", "block_causal"])
@torch.no_grad()
def test_a_training_pass_equals_the_reference(name: str) -> None:
    case, model, spec = golden.load("training_a"), golden.model(), golden.spec()
    clean, noisy = case["clean"].unsqueeze(0), case["noisy"].unsqueeze(0)
    sigma = case["timestep"].unsqueeze(0) / 1000
    num_chunks = sigma.shape[1] // spec.chunk_frames
    text = model.encode_text(case["text"])
    if name == "teacher_forcing":
        layout = TokenLayout.teacher_forcing(spec, num_chunks)
        noisy, sigma = torch.cat((clean, noisy), 2), torch.cat((torch.zeros_like(sigma), sigma), 1)
        text = text.select(torch.arange(num_chunks).repeat(2))
    else:
        layout = TokenLayout.block_causal(spec, num_chunks)
    flow = model(noisy, sigma, text, rope=model.rope(layout), attention=Masked(layout))
    frames = num_chunks * spec.chunk_frames
    assert golden.relative_error(flow[0, :, -frames:], case[f"{name}_flow"]) < golden.TOLERANCE
