"""Conversion of prompts to features: cleaning, tokens, padding, distinct prompts, gradients."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

from longvideo.text.encoder import TextEncoder, clean_prompt
from tests import golden

WORDS = ("a", "red", "blue", "ball", "moves", "left", "zig-zag")


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder.build_tiny(WORDS).eval()


def test_prompts_are_cleaned_without_dependencies() -> None:
    assert clean_prompt("  a&amp;amp;b \n\t red&#39;s  ball ") == "a&b red's ball"


def test_tiny_tokens_are_lower_case_words_and_punctuation(encoder: TextEncoder) -> None:
    ids, mask = encoder.tokenize(["A Red, RED ball!", "left"])
    tokens = [encoder.tokenizer.id_to_token(token) for token in ids[0].tolist()]
    assert tokens == ["a", "red", ",", "red", "ball", "!", "</s>"] + ["<pad>"] * 9
    assert ids.shape == mask.shape == (2, 16)
    assert mask.sum(1).tolist() == [7, 2]
    assert ids[1, 1] == 1 and ids[1, 2] == 0


def test_the_sizes_of_tiny(encoder: TextEncoder) -> None:
    config = encoder.config_json()
    sizes = {key: config[key] for key in ("d_model", "d_kv", "num_heads", "d_ff", "num_layers", "feed_forward_proj")}
    assert sizes == {
        "d_model": 128,
        "d_kv": 32,
        "num_heads": 4,
        "d_ff": 256,
        "num_layers": 2,
        "feed_forward_proj": "gated-gelu",
    }
    assert encoder.encode(["a ball"])[0].shape == (1, 512, 128)


@torch.no_grad()
def test_short_computation_equals_padding_to_512_in_full(encoder: TextEncoder) -> None:
    prompts = ["a red ball moves left", "blue " * 30, ""]
    ids, mask = encoder.tokenize(prompts)
    assert ids.shape[1] == 32
    features = encoder(ids, mask)
    full_ids = torch.nn.functional.pad(ids, (0, 512 - 32))
    full_mask = torch.nn.functional.pad(mask, (0, 512 - 32))
    hidden = encoder.model(full_ids, full_mask)
    assert golden.relative_error(features, hidden * full_mask.unsqueeze(-1)) < 1e-6
    assert features[full_mask == 0].abs().max() == 0
    assert hidden[full_mask == 0].abs().max() > 0


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_those_of_transformers(encoder: TextEncoder, dtype: torch.dtype) -> None:
    from transformers.models.umt5.configuration_umt5 import UMT5Config
    from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel

    theirs: Any = UMT5EncoderModel(UMT5Config.from_dict(encoder.config_json())).eval()
    theirs.load_state_dict(encoder.model.state_dict())
    ids = torch.randint(encoder.tokenizer.get_vocab_size(), (3, 400), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(400) < torch.tensor([[400], [150], [2]])).long()
    expected = theirs.to(dtype)(input_ids=ids, attention_mask=mask).last_hidden_state
    features = copy.deepcopy(encoder.model).to(dtype)(ids, mask)
    assert features.dtype == expected.dtype == dtype
    assert golden.relative_error(features[mask == 1], expected[mask == 1]) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_distinct_prompts_are_computed_once(encoder: TextEncoder) -> None:
    calls: list[int] = []
    handle = encoder.model.register_forward_hook(lambda *_: calls.append(1))
    prompts = ["a red ball", "a blue ball", " a red  ball", "a red ball"]
    features, index = encoder.encode(prompts)
    assert features.shape[0] == 2 and index.tolist() == [0, 1, 0, 0] and len(calls) == 2
    again, index = encoder.encode(["a blue ball", "left"])
    assert len(calls) == 3 and index.tolist() == [0, 1]
    assert torch.equal(again[0], features[1])
    handle.remove()


def test_a_changed_weight_empties_the_cache() -> None:
    encoder = TextEncoder.build_tiny(WORDS).eval()
    before, _ = encoder.encode(["a red ball"])
    with torch.no_grad():
        encoder.model.get_parameter("shared.weight").mul_(1.5)
    after, _ = encoder.encode(["a red ball"])
    assert not torch.allclose(before, after)


def test_features_do_not_depend_on_neighbours(encoder: TextEncoder) -> None:
    fresh = TextEncoder.build_tiny(WORDS).eval()
    alone, _ = fresh.encode(["a red ball"])
    together, _ = encoder.encode(["blue " * 100, "a red ball"])
    assert torch.equal(alone[0], together[1])


def test_gradients_reach_every_parameter() -> None:
    encoder = TextEncoder.build_tiny(WORDS).train()
    features = encoder(*encoder.tokenize(["a red ball moves left", "blue"]))
    features.square().mean().backward()
    missing = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


def test_a_long_prompt_keeps_its_beginning_and_end_mark(encoder: TextEncoder) -> None:
    with pytest.warns(UserWarning, match="has 601 tokens; only the first 512 are used"):
        ids, mask = encoder.tokenize(["red " * 600])
    assert ids.shape == (1, 512) and mask.all()
    assert ids[0, -1] == 1 and (ids[0, :-1] == ids[0, 0]).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.tokenize(["red " * 511])


def test_unknown_words_are_named_as_written(encoder: TextEncoder) -> None:
    assert encoder.unknown_words("A Pony and a red BALL; zig-zag, Pony!") == ["Pony", "and"]
    assert encoder.unknown_words("a red ball") == []


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_one_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one = TextEncoder.build_tiny(WORDS, seed=1)
    assert torch.equal(torch.rand(1), expected)
    two, other = TextEncoder.build_tiny(reversed(WORDS), seed=1), TextEncoder.build_tiny(WORDS, seed=2)
    assert torch.equal(one.model.get_parameter("shared.weight"), two.model.get_parameter("shared.weight"))
    assert not torch.equal(one.model.get_parameter("shared.weight"), other.model.get_parameter("shared.weight"))
    assert one.tokenizer.get_vocab() == two.tokenizer.get_vocab()
