"""A damaged checkpoint gives one error that names the tensor or file, and nothing is written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from longvideo.checkpoint.conversion import ConversionOptions, convert_model
from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.tensors import check_finite
from longvideo.cli.main import main
from longvideo.errors import CheckpointError
from tests.checkpoint import official

Damage = Callable[[dict[str, Tensor]], None]
LORA = "base_model.model.blocks.0.self_attn.q"


@dataclass(frozen=True)
class Case:
    """A file of a source, the damage to its tensors, and a pattern of the error."""

    file: str
    damage: Damage
    message: str


def drop(name: str) -> Damage:
    return lambda tensors: void(tensors.pop(name))


def rename(name: str, other: str) -> Damage:
    return lambda tensors: tensors.update({other: tensors.pop(name)})


def copy_to(name: str, other: str) -> Damage:
    return lambda tensors: tensors.update({other: tensors[name].clone()})


def put(name: str, change: Callable[[Tensor], Tensor]) -> Damage:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


def void(value: object) -> None:
    del value


def transposed(x: Tensor) -> Tensor:
    return x.t()


def wider(x: Tensor) -> Tensor:
    return torch.cat([x, x[:1]])


def whole_numbers(x: Tensor) -> Tensor:
    return x.long()


DIT = "wan/diffusion_pytorch_model.safetensors"
VAE = "wan/Wan2.2_VAE.pth"
TEXT = "wan/models_t5_umt5-xxl-enc-bf16.pth"
OURS = "ours/transformer/diffusion_pytorch_model.safetensors"
OUR_VAE = "ours/vae/diffusion_pytorch_model.safetensors"
PACKED = "packed/transformer/diffusion_pytorch_model.safetensors"
LONGLIVE, PACKED_LONGLIVE, ADAPTER = "model.pt", "packed.pt", "lora.pt"
Q = "blocks.0.self_attn.q"
FFN = "blocks.1.ffn.2"
CASES = {
    "official, missing": Case(DIT, drop(f"{Q}.weight"), rf"1 missing: {Q}\.weight"),
    "official, extra": Case(DIT, copy_to(f"{Q}.weight", f"{Q}.gate"), rf"1 unexpected: {Q}\.gate"),
    "official, renamed": Case(DIT, rename(f"{Q}.bias", f"{Q}.offset"), rf"missing: {Q}\.bias.*unexpected: {Q}\.offset"),
    "official, another block": Case(DIT, rename(f"{FFN}.bias", "blocks.7.ffn.2.bias"), r"blocks\.1\.ffn\.2\.bias"),
    "official, doubled by a prefix": Case(
        DIT, copy_to(f"{Q}.bias", f"model.{Q}.bias"), rf"are both names of '{Q}\.bias'"
    ),
    "official, transposed": Case(DIT, put(f"{FFN}.weight", transposed), rf"wrongly shaped: {FFN}\.weight \[64, 128\]"),
    "official, too wide": Case(
        DIT, put("head.head.bias", wider), r"wrongly shaped: head\.head\.bias \[193\], expected"
    ),
    "official, whole numbers": Case(
        DIT, put(f"{Q}.weight", whole_numbers), rf"wrongly typed: {Q}\.weight torch\.int64"
    ),
    "official, no text": Case(DIT, drop("text_embedding.0.weight"), r"has no text_embedding\.0\.weight"),
    "official, no patches": Case(DIT, drop("patch_embedding.weight"), r"missing: patch_embedding\.weight"),
    "vae, missing": Case(
        VAE, drop("decoder.middle.1.norm.gamma"), r"1 missing: decoder\.mid_block\.attentions\.0\.norm"
    ),
    "vae, extra": Case(VAE, copy_to("conv2.bias", "conv3.bias"), r"1 unexpected: conv3\.bias"),
    "vae, too wide": Case(VAE, put("conv1.bias", wider), r"wrongly shaped: quant_conv\.bias \[97\], expected \[96\]"),
    "vae, without its first": Case(VAE, drop("encoder.conv1.weight"), r"has no encoder\.conv_in\.weight"),
    "vae, doubled by a wrapper": Case(
        VAE, copy_to("conv2.bias", "module.conv2.bias"), r"are both names of 'conv2\.bias'"
    ),
    "vae, whole numbers": Case(VAE, put("conv2.bias", whole_numbers), r"wrongly typed: post_quant_conv\.bias"),
    "text, missing": Case(
        TEXT, drop("blocks.1.ffn.fc1.weight"), r"missing: encoder\.block\.1\.layer\.1\..*wi_1\.weight"
    ),
    "text, extra": Case(TEXT, copy_to("norm.weight", "norm3.weight"), r"1 unexpected: norm3\.weight"),
    "text, another vocabulary": Case(
        TEXT, put("token_embedding.weight", lambda x: x[:3]), r"it has the id \d+; expected 0 to 2"
    ),
    "text, without buckets": Case(
        TEXT, drop("blocks.0.pos_embedding.embedding.weight"), r"has no encoder\.block\.0\..*relative_attention_bias"
    ),
    "diffusers, missing": Case(OURS, drop("blocks.0.attn1.to_q.weight"), rf"missing: {Q}\.weight"),
    "diffusers, official name": Case(
        OURS, copy_to("proj_out.bias", "head.head.bias"), r"are both names of 'head\.head\.bias'"
    ),
    "diffusers, vae too wide": Case(OUR_VAE, put("quant_conv.bias", wider), r"wrongly shaped: quant_conv\.bias \[97\]"),
    "packed, no scales": Case(PACKED, drop("blocks.0.attn1.to_q.weight_scales"), rf"missing: {Q}\.weight_scales"),
    "packed, no codes": Case(PACKED, drop("blocks.0.attn1.to_q.weight_codes"), rf"missing: {Q}\.weight"),
    "packed, codes of bytes with a sign": Case(
        PACKED,
        put("blocks.0.attn1.to_q.weight_codes", lambda x: x.view(torch.int8)),
        rf"{Q}\.weight_codes is torch\.int8",
    ),
    "packed, codes of half": Case(
        PACKED, put("blocks.0.attn1.to_q.weight_codes", lambda x: x[:, :8]), rf"wrongly shaped: {Q}\.weight_codes"
    ),
    "longlive, missing": Case(LONGLIVE, drop(f"model.{FFN}.weight"), rf"missing: {FFN}\.weight"),
    "longlive, whole numbers": Case(LONGLIVE, put(f"model.{Q}.bias", whole_numbers), rf"wrongly typed: {Q}\.bias"),
    "longlive packed, no amax": Case(
        PACKED_LONGLIVE, drop(f"model.{Q}.quantized_weight_amax"), rf"has no {Q}\.quantized_weight_amax"
    ),
    "longlive packed, sizes that do not agree": Case(
        PACKED_LONGLIVE,
        put(f"model.{Q}.quantized_weight_metadata", lambda x: x * 2),
        rf"{Q}\.quantized_weight_values has shape",
    ),
    "longlive packed, impossible sizes": Case(
        PACKED_LONGLIVE,
        put(f"model.{Q}.quantized_weight_metadata", lambda x: -x),
        rf"{Q}\.quantized_weight_metadata has sizes",
    ),
    "longlive packed, scales of another kind": Case(
        PACKED_LONGLIVE,
        put(f"model.{Q}.quantized_weight_scale_factors", lambda x: x.view(torch.uint8)),
        rf"{Q}\.quantized_weight_scale_factors is torch\.uint8",
    ),
    "lora, half of a pair": Case(
        ADAPTER, drop(f"{LORA}.lora_B.weight"), rf"{Q}\.lora_A\.weight has no matching lora_B"
    ),
    "lora, of another model": Case(
        ADAPTER, put(f"{LORA}.lora_B.weight", wider), rf"updates {Q}\.weight of shape \[129, 128\]"
    ),
    "lora, two ranks": Case(
        ADAPTER,
        put(f"{LORA}.lora_A.weight", wider),
        r"lora_A\.weight has rank 5, but .*lora_B\.weight has rank 4",
    ),
    "lora, of no layer": Case(
        ADAPTER,
        rename(f"{LORA}.lora_A.weight", "blocks.9.x.lora_A.weight"),
        r"\.lora_[AB]\.weight has no matching lora_[AB]",
    ),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    model = official.save(folder / "ours")
    convert_model(model, folder / "wan", ConversionOptions("official"))
    convert_model(model, folder / "packed", ConversionOptions(precision="nvfp4"))
    convert_model(model, folder / "model.pt", ConversionOptions("longlive"))
    convert_model(ModelFolder.open(folder / "packed"), folder / "packed.pt", ConversionOptions("longlive"))
    lora = {f"{LORA}.lora_A.weight": torch.ones(4, 128), f"{LORA}.lora_B.weight": torch.ones(128, 4)}
    torch.save({"generator_lora": lora}, folder / "lora.pt")
    return folder


@pytest.fixture
def workspace(sources: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sources, tmp_path / "workspace"))


def damage_file(file: Path, damage: Damage) -> None:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata()
        tensors = load_file(file)
        damage(tensors)
        save_file(tensors, file, metadata=metadata)
    else:
        content = torch.load(file, weights_only=True)
        tensors = next((content[key] for key in ("generator", "generator_lora") if key in content), content)
        damage(tensors)
        torch.save(content, file)


def refused(workspace: Path, file: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Convert a source; return the error, which must be one line, and check that nothing is written."""
    source = workspace / file if file.endswith(".pt") else workspace / Path(file).parts[0]
    base = ["--base", str(workspace / "ours")] if file.endswith(".pt") else []
    before = sorted(workspace.rglob("*"))
    assert main(["convert", str(source), str(workspace / "result"), *base]) == 2
    assert sorted(workspace.rglob("*")) == before
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("error: ") and output.err.count("\n") == 1
    return output.err


@pytest.mark.parametrize("name", CASES)
def test_a_damaged_checkpoint_is_refused_by_name(
    name: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    damage_file(workspace / case.file, case.damage)
    assert re.search(case.message, refused(workspace, case.file, capsys))


def all_nan(x: Tensor) -> Tensor:
    return torch.full_like(x, float("nan"))


def one_infinity(x: Tensor) -> Tensor:
    changed = x.float().clone()
    changed.view(-1)[-1] = float("nan") if x.dtype == torch.float8_e4m3fn else -float("inf")  # E4M3 has no infinity
    return changed.to(x.dtype)


@pytest.mark.parametrize(
    ("file", "name", "label"),
    [
        (DIT, f"{Q}.weight", rf"{Q}\.weight"),
        (VAE, "decoder.head.2.bias", r"decoder\.conv_out\.bias"),
        (TEXT, "norm.weight", r"encoder\.final_layer_norm\.weight"),
        (OURS, "blocks.0.attn1.to_q.bias", rf"{Q}\.bias"),
        (PACKED, "blocks.0.attn1.to_q.weight_tensor_scale", rf"{Q}\.weight_tensor_scale"),
        (PACKED, "blocks.0.attn1.to_q.weight_scales", rf"{Q}\.weight_scales"),
        (LONGLIVE, "model.head.modulation", r"head\.modulation"),
        (ADAPTER, f"{LORA}.lora_A.weight", rf"{Q}\.weight"),
    ],
)
@pytest.mark.parametrize("damage", [all_nan, one_infinity])
def test_nan_and_infinity_are_refused_by_name_when_a_model_is_loaded_or_converted(
    damage: Callable[[Tensor], Tensor],
    file: str,
    name: str,
    label: str,
    workspace: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage_file(workspace / file, put(name, damage))
    assert re.search(rf"{label} contains NaN or infinity", refused(workspace, file, capsys))
    source = workspace / file if file.endswith(".pt") else workspace / Path(file).parts[0]
    folder = ModelFolder.open(source, base=workspace / "ours" if file.endswith(".pt") else None)
    with pytest.raises(CheckpointError, match=rf"{label} contains NaN or infinity"):
        folder.load_transformer(dtype=torch.bfloat16)
        folder.load_vae(dtype=torch.float32)
        folder.load_text_encoder()


def test_a_value_that_the_wanted_dtype_cannot_hold_is_refused_too(workspace: Path) -> None:
    damage_file(workspace / OURS, put("proj_out.weight", lambda x: x.double() + 1e300))
    assert ModelFolder.open(workspace / "ours").load_transformer()
    with pytest.raises(CheckpointError, match=r"head\.head\.weight contains NaN or infinity"):
        ModelFolder.open(workspace / "ours").load_transformer(dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float64]
)
def test_every_value_of_every_dtype_but_nan_and_infinity_is_finite(dtype: torch.dtype) -> None:
    extremes = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min, 0.0], dtype=torch.float64).to(dtype)
    check_finite(extremes, "x")
    check_finite(torch.empty(0, dtype=dtype), "x")
    long = torch.zeros(2**20 + 3, dtype=torch.float32)
    long[-1] = float("nan")
    with pytest.raises(CheckpointError, match="x contains NaN or infinity"):
        check_finite(long.to(dtype), "x")


@pytest.mark.parametrize("file", [DIT, VAE, TEXT, OURS, PACKED, LONGLIVE, ADAPTER])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.999])
def test_a_truncated_file_is_refused_by_name(
    file: str, part: float, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (workspace / file).read_bytes()
    (workspace / file).write_bytes(content[: int(part * len(content))])
    output = refused(workspace, file, capsys)
    assert Path(file).name in output and "truncated" in output
    if file == DIT and part > 0:
        assert "is cut off" in output and ".weight" in output


def test_tensors_in_two_files_and_two_files_of_one_part_are_refused(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(workspace / DIT)
    names = sorted(tensors)
    half, other = {n: tensors[n] for n in names[:40]}, {n: tensors[n] for n in names[39:]}
    (workspace / DIT).unlink()
    for number, shard in enumerate((half, other), start=1):
        save_file(shard, workspace / "wan" / f"model-{number:05d}-of-00002.safetensors")
    weight_map = {n: f"model-{1 if n in half else 2:05d}-of-00002.safetensors" for n in names}
    index = workspace / "wan" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert f"'{names[39]}' is both in" in refused(workspace, DIT, capsys)
    index.write_text(json.dumps({"weight_map": weight_map | {names[0]: "../ours/x.safetensors"}}))
    assert "expected the name of a .safetensors file in the same folder" in refused(workspace, DIT, capsys)
    index.unlink()
    for shard_file in (workspace / "wan").glob("model-*"):
        shard_file.unlink()
    for name in ("a.safetensors", "b.safetensors"):
        save_file(tensors, workspace / "wan" / name)
    assert "has two of transformer, in a.safetensors and b.safetensors" in refused(workspace, DIT, capsys)


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this ran",)


def test_a_pickle_that_would_run_code_is_refused(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = torch.load(workspace / LONGLIVE, weights_only=True)
    torch.save({**content, "step": Harmful()}, workspace / LONGLIVE)
    output = refused(workspace, LONGLIVE, capsys)
    assert "this ran" not in output and "model.pt is truncated or contains more than tensors" in output
    codes = {name: x.byte() if name.endswith("ffn.0.weight") else x for name, x in content["generator"].items()}
    torch.save({"checkpoint_format": "longlive_generator_te_nvfp4", "generator": codes}, workspace / LONGLIVE)
    assert "stores modules of TransformerEngine" in refused(workspace, LONGLIVE, capsys)


def test_a_tensor_larger_than_its_file_is_refused_before_memory_is_taken(workspace: Path) -> None:
    # a storage of 4 TB in a file of a few kB
    huge = torch.empty(1).expand(10**6, 10**6)
    torch.save({"generator": {"a": huge}}, workspace / "expanded.pt")
    with pytest.raises(CheckpointError, match="a has 1000000000000 values, but fewer are stored"):
        ModelFolder.open(workspace / "expanded.pt")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("meta", r"a has no values, as on the device meta"),
        ("meta next to others", r"a has no values"),
        ("sparse", "a is not a plain tensor; save a dense copy"),
        ("compressed", "is truncated or contains more than tensors"),
        ("nested", "is truncated or contains more than tensors"),
        ("conjugate", "a is not a plain tensor"),
        ("uninitialized", "it would run torch.nn.parameter.UninitializedParameter"),
        ("a storage", "is not a dict of tensors: a"),
        ("a list", "is not a dict of tensors: a"),
        ("a cycle", "is not a dict of tensors: self"),
        ("long name", r"its tensors \(n{120}\.\.\., \.\.\.\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*prototype stage.*", "ignore:.*beta state.*")
def test_storages_that_are_no_plain_values_are_one_line(
    kind: str, message: str, workspace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    values = torch.eye(3)
    contents: dict[str, Callable[[], dict[str, object]]] = {
        "meta": lambda: {"a": torch.empty(3, device="meta")},
        "meta next to others": lambda: {"generator": {"b": values, "a": torch.empty(3, device="meta")}, "step": 3},
        "sparse": lambda: {"a": values.to_sparse()},
        "compressed": lambda: {"a": values.to_sparse_csr()},
        "nested": lambda: {"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
        "conjugate": lambda: {"a": torch.ones(3, dtype=torch.complex64).conj()},
        "uninitialized": lambda: {"a": torch.nn.parameter.UninitializedParameter()},
        "a storage": lambda: {"a": values.untyped_storage()},
        "a list": lambda: {"a": [values]},
        "a cycle": lambda: with_itself({"a": values}),
        "long name": lambda: {"n" * 5000: values},
    }
    torch.save(contents[kind](), workspace / "odd.pt")
    capfd.readouterr()
    assert main(["info", str(workspace / "odd.pt")]) == 2
    output = capfd.readouterr()
    assert output.out == "" and output.err.startswith("error: ") and output.err.count("\n") == 1
    assert re.search(message, output.err) and "odd.pt" in output.err and len(output.err) < 500


def with_itself(content: dict[str, object]) -> dict[str, object]:
    content["self"] = content
    return content


def test_a_text_file_is_no_model(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace / "notes.txt").write_text("hello")
    assert main(["convert", str(workspace / "notes.txt"), str(workspace / "result")]) == 2
    assert "is not a weight file" in capsys.readouterr().err


SETTINGS, TRANSFORMER = "ours/longvideo.json", "ours/transformer/config.json"
VAE_CONFIG, TEXT_CONFIG = "ours/vae/config.json", "ours/text_encoder/config.json"
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (SETTINGS, {"cut_prefix": "${oc.env:HOME}"}, r"cut_prefix contains \$\{"),
        (SETTINGS, {"cut_prefix": "x" * 10**6}, "cut_prefix has 1000000 characters, expected at most 1000"),
        (SETTINGS, {"shift": INF}, "shift is inf; expected a finite number"),
        (SETTINGS, {"shift": NAN}, "shift is nan"),
        (SETTINGS, {"guidance": NAN}, "guidance is nan; expected a finite number"),
        (SETTINGS, {"guidance": -1.0}, r"guidance is -1\.0"),
        (SETTINGS, {"height": 3_200_000}, "height is 3200000; expected a whole number from 1 to 16384"),
        (SETTINGS, {"height": 16384, "width": 16384}, "tokens; expected at most 1048576"),
        (SETTINGS, {"height": True}, "height"),
        (SETTINGS, {"width": -96}, "width is -96; expected"),
        (SETTINGS, {"width": 96.5}, r"width is 96\.5; expected"),
        (SETTINGS, {"chunk_frames": 10**6}, "chunk_frames is 1000000; expected a whole number from 1 to 1024"),
        (SETTINGS, {"window_frames": 10**6}, "window_frames is 1000000; expected a whole number from 1 to 16384"),
        (SETTINGS, {"window_frames": 4}, "window_frames=4, expected at least chunk_frames=8"),
        (SETTINGS, {"fps": 10**9}, "fps is 1000000000; expected a whole number from 1 to 1000"),
        (SETTINGS, {"fps": 10**400}, "a number has 401 digits"),
        (SETTINGS, {"fps": NAN}, "fps"),
        (SETTINGS, {"offset_per_shot": 10**9}, "offset_per_shot is 1000000000; expected"),
        (SETTINGS, {"text_len": 10**8}, "text_len is 100000000; expected a whole number from 1 to 8192"),
        (SETTINGS, {"steps": 1001}, "steps is 1001; expected a whole number from 1 to 1000"),
        (SETTINGS, {"pin_shots": 3}, "pin_shots"),
        (TRANSFORMER, {"num_layers": 10**6}, "num_layers is 1000000; expected a whole number from 1 to 1000"),
        (TRANSFORMER, {"ffn_dim": 2**70}, "ffn_dim is "),
        (TRANSFORMER, {"ffn_dim": True}, "ffn_dim=True"),
        (TRANSFORMER, {"num_attention_heads": 1024, "attention_head_dim": 1024}, "is 1048576; expected at most 65536"),
        (TRANSFORMER, {"eps": NAN}, "eps is nan; expected a number from"),
        (TRANSFORMER, {"patch_size": [1, 10**9, 2]}, "patch_size is 1000000000; expected"),
        (VAE_CONFIG, {"dim_mult": [0, 1, 1, 1]}, "dim_mult is 0; expected a whole number from 1 to 64"),
        (VAE_CONFIG, {"dim_mult": [1] * 10**5}, "dim_mult is .*expected a list of at most 8"),
        (VAE_CONFIG, {"dim_mult": 4}, "dim_mult is 4; expected a list"),
        (
            VAE_CONFIG,
            {"temperal_downsample": [0, 1, 1]},
            "temperal_downsample is .*expected a list of at most 8 booleans",
        ),
        (VAE_CONFIG, {"latents_std": ["a"] * 48}, r"latents_std\[0\] is 'a'; expected a number"),
        (VAE_CONFIG, {"latents_std": [1e-300] * 48}, r"latents_std\[0\] is 1e-300; expected a number from 1e-06"),
        (VAE_CONFIG, {"latents_mean": [NAN] * 48}, r"latents_mean\[0\] is nan; expected a number"),
        (VAE_CONFIG, {"latents_mean": 3}, "latents_mean is 3; expected a list of 48"),
        (VAE_CONFIG, {"num_res_blocks": 10**7}, "num_res_blocks is 10000000; expected a whole number from 1 to 100"),
        (VAE_CONFIG, {"base_dim": "wide"}, "base_dim is 'wide'; expected a whole number from 1 to 4096"),
        (VAE_CONFIG, {"z_dim": True}, "z_dim is True"),
        (VAE_CONFIG, {"scale_factor_temporal": NAN}, "scale_factor_temporal is nan"),
        (TEXT_CONFIG, {"num_layers": 10**7}, "num_layers is 10000000; expected a whole number from 1 to 1000"),
        (TEXT_CONFIG, {"d_model": 2**40}, "d_model is 1099511627776; expected"),
        (TEXT_CONFIG, {"num_heads": 1024, "d_kv": 1024}, "is 1048576, expected at most 65536"),
        (TEXT_CONFIG, {"vocab_size": 2**31}, "vocab_size is 2147483648; expected"),
        (TEXT_CONFIG, {"layer_norm_epsilon": INF}, "layer_norm_epsilon is inf; expected"),
        (TEXT_CONFIG, {"relative_attention_max_distance": 8}, "relative_attention_max_distance=8; expected"),
        (TEXT_CONFIG, {"relative_attention_num_buckets": 1}, "relative_attention_num_buckets=1,"),
        ("ours/model_index.json", {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "lists two transformers"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(
    file: str, change: dict[str, object], message: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workspace / file).write_text(json.dumps(json.loads((workspace / file).read_text()) | change))
    output = refused(workspace, file, capsys)
    assert re.search(message, output) and str(workspace / "ours") in output and len(output) < 600


@pytest.mark.parametrize("text", ["[" * 100_000, '{"shift": ' + "9" * 5000 + "}"])
def test_json_that_cannot_be_read_is_refused(text: str, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace / "ours" / "longvideo.json").write_text(text)
    assert "longvideo.json is not JSON" in refused(workspace, OURS, capsys)


def test_damaged_bytes_of_a_pickle_are_one_line(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray((workspace / ADAPTER).read_bytes())
    start = content.index(b"lora_A") - 200
    for place in range(start, start + 300, 7):
        damaged = bytearray(content)
        damaged[place] ^= 0x55
        (workspace / "x.pt").write_bytes(damaged)
        assert main(["info", str(workspace / "x.pt")]) in (0, 2)
        output = capsys.readouterr().err
        assert output == "" or (output.startswith("error: ") and output.count("\n") == 1)


def test_what_a_terminal_would_obey_is_written_out(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage_file(workspace / DIT, copy_to("head.head.bias", "\x1b]0;title\x07[/red]"))
    output = refused(workspace, DIT, capsys)
    assert "\x1b" not in output and r"\x1b]0;title\x07[/red]" in output
    torch.save(
        {"generator": torch.load(workspace / LONGLIVE)["generator"], "note[/x]": "\x1b[31m"}, workspace / "note.pt"
    )
    assert main(["info", str(workspace / "note.pt")]) == 0
    assert r"note[/x]: \x1b[31m" in capsys.readouterr().out
