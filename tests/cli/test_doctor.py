"""`longvideo doctor`: its report on a machine, on the operations, and on a model that may fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longvideo.checkpoint.folder import ModelFolder
from longvideo.cli import doctor_report, self_test
from longvideo.cli.main import main
from longvideo.model.config import PRESETS
from longvideo.model.transformer import CausalTransformer
from tests.decoder_files import save, tiny_weights
from tests.infer import small as generating

CPU = torch.device("cpu")
WAN = "wan2.2-ti2v-5b"
NO_GPU = not torch.cuda.is_available()
without_gpu = pytest.mark.skipif(not NO_GPU, reason="this machine has a GPU")

GB = 10**9

DoctorJson = Callable[..., dict[str, Any]]
SetFree = Callable[..., None]


@pytest.fixture
def doctor_json(capsys: pytest.CaptureFixture[str]) -> DoctorJson:
    """Run the command with --json, check its exit code, and return what it prints."""

    def run(*options: str, code: int = 0) -> dict[str, Any]:
        assert main(["doctor", *options, "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> SetFree:
    """Give the machine GPUs of compute capability 9.0 with this much free memory, in GB."""

    def set_free(*free: float) -> None:
        properties = SimpleNamespace(name="Testing 9000", total_memory=80 * GB, major=9, minor=0, uuid="aaa")
        values: dict[str, Callable[..., Any]] = {
            "is_available": lambda: True,
            "device_count": lambda: len(free),
            "current_device": lambda: 0,
            "get_device_properties": lambda _device: properties,
            "get_device_capability": lambda _device=None: (9, 0),
            "mem_get_info": lambda device: (int(free[device.index] * GB), 80 * GB),
            "can_device_access_peer": lambda _first, _second: True,
        }
        for name, value in values.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(doctor_report, "operations", lambda _device: [])  # these use the device

    return set_free


def test_every_operation_has_a_backend_and_every_other_a_reason() -> None:
    rows = self_test.operations(CPU)
    assert len({row.name for row in rows}) == len(rows) == 11
    in_fp8 = {"attention in fp8", "product of fp8 weights and inputs"}
    for row in rows[:-1]:
        assert (row.backend == "none") == (row.name in in_fp8) and row.rejected
        assert all(backend != row.backend and reason for backend, reason in row.rejected.items())


def test_attention_is_what_torch_chooses() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.MATH]):
        (row,) = [row for row in self_test.operations(CPU) if row.name == "attention in bf16"]
    assert row.backend.partition(",")[0] == "reference"
    assert row.rejected.keys() == {"cuDNN", "torch's flash attention"}


def test_without_triton_a_gpu_has_no_kernels_and_no_reference_in_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "the package triton is not installed; it comes with torch's CUDA builds"
    monkeypatch.setattr(self_test.backends, "missing_triton", lambda: reason)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: (9, 0))
    rows = self_test._kernels(torch.device("cuda", 0))
    assert {row.backend for row in rows} == {"none"}
    assert all(row.rejected == {"triton": reason} for row in rows)


def test_the_encoder_of_videos_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    av = pytest.importorskip("av")
    row = self_test.operations(CPU)[-1]
    assert (row.name, row.backend, row.rejected) == ("H.264 of videos", f"libx264 of PyAV {av.__version__}", {})
    monkeypatch.setattr(self_test, "H264_ENCODER", "no_such_encoder")
    row = self_test.operations(CPU)[-1]
    assert row.backend == "none" and "was built without it" in row.rejected["no_such_encoder"]


def test_the_checks_pass_here(doctor_json: DoctorJson) -> None:
    report = doctor_json("--device", "cpu", "--self-test")
    assert [check["name"] for check in report["checks"]] == list(self_test.CHECKS)
    assert all(check["passed"] for check in report["checks"])


def test_a_failing_check_ends_with_code_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode = self_test.reference.encode
    monkeypatch.setattr(self_test.reference, "encode", lambda values: encode(values) ^ 1)
    assert main(["doctor", "--device", "cpu", "--self-test"]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_check_that_cannot_run_has_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_device: torch.device) -> Any:
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    monkeypatch.setitem(self_test.CHECKS, "round trip of a Gaussian matrix", broken)
    assert main(["doctor", "--device", "cpu", "--self-test"]) == 1
    line = "FAIL  round trip of a Gaussian matrix: RuntimeError: Failed to find C compiler. Please specify one\n"
    assert line in capsys.readouterr().out


def test_the_report_has_every_section(doctor_json: DoctorJson) -> None:
    report = doctor_json("--device", "cpu")
    assert report.keys() == {"machine", "graphics", "memory", "disks", "operations", "checks", "settings", "model"}
    assert report["graphics"].keys() == {"gpus", "none_because", "links", "driver", "torch_cuda"}
    assert report["machine"]["torch"] == torch.__version__ and report["graphics"]["torch_cuda"] == torch.version.cuda
    assert report["memory"].keys() == {"total_bytes", "available_bytes"}
    assert report["disks"]["the current folder"].keys() == {"path", "total_bytes", "free_bytes"}
    assert report["operations"][0].keys() == {"name", "backend", "rejected"}
    assert report["checks"] == [] and report["model"] is None


@without_gpu
def test_a_machine_without_a_gpu_gives_the_reason(doctor_json: DoctorJson, capsys: pytest.CaptureFixture[str]) -> None:
    graphics = doctor_json()["graphics"]
    assert graphics["gpus"] == graphics["links"] == [] and graphics["none_because"]
    assert main(["doctor"]) == 0
    assert f"none: {graphics['none_because']}\n" in capsys.readouterr().out


def test_gpus_are_listed_with_their_free_memory(
    gpus: SetFree, doctor_json: DoctorJson, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus(70.0)
    graphics = doctor_json()["graphics"]
    assert graphics["none_because"] is None
    assert graphics["gpus"] == [
        {
            "index": 0,
            "name": "Testing 9000",
            "total_bytes": 80 * GB,
            "free_bytes": 70 * GB,
            "compute_capability": "9.0",
        }
    ]
    assert main(["doctor"]) == 0
    assert "Testing 9000, 80.0 GB, 70.0 GB free, compute capability 9.0\n" in capsys.readouterr().out


@pytest.mark.parametrize("source", [("--model", "tiny"), ("--preset", WAN), ("--preset", "tiny")])
def test_the_parts_add_up_to_the_total(gpus: SetFree, doctor_json: DoctorJson, source: tuple[str, str]) -> None:
    gpus(70.0, 70.0)
    devices = doctor_json(*source, "--decode-device", "cuda:1")["model"]["serve"]["devices"]
    assert devices.keys() == {"cuda:0", "cuda:1"}
    for device in devices.values():
        assert sum(device["parts"].values()) == device["needed_bytes"] > GB
        assert device["fits"] is True and device["free_bytes"] == 70 * GB


def test_a_preset_takes_two_bytes_for_each_parameter_of_its_transformer_and_text_encoder(
    gpus: SetFree, doctor_json: DoctorJson
) -> None:
    gpus(70.0)
    model = doctor_json("--preset", WAN)["model"]
    parts = model["serve"]["devices"]["cuda:0"]["parts"]
    with torch.device("meta"):
        transformer = CausalTransformer(PRESETS[WAN])
    assert parts["transformer"] == pytest.approx(2 * sum(x.numel() for x in transformer.parameters()), rel=0.01)
    assert parts["text encoder"] == pytest.approx(2 * 5.681e9, rel=0.01)
    assert parts["KV cache"] == pytest.approx(10.4 * GB, rel=0.01)
    assert (model["folder"], model["file_bytes"]) == (None, None)
    guided = doctor_json("--preset", WAN, "--guidance", "5")["model"]
    assert (
        guided["guidance"] == 5.0 and guided["serve"]["devices"]["cuda:0"]["parts"]["KV cache"] == 2 * parts["KV cache"]
    )
    assert (
        doctor_json("--preset", WAN, "--precision", "fp8")["model"]["serve"]["devices"]["cuda:0"]["parts"][
            "transformer"
        ]
        < 5.2e9
    )


def test_the_files_of_a_folder_are_counted(gpus: SetFree, doctor_json: DoctorJson) -> None:
    gpus(70.0)
    model = doctor_json("--model", "tiny")["model"]
    folder = ModelFolder.open("tiny").path
    assert model["folder"] == str(folder)
    assert model["file_bytes"] == sum(x.stat().st_size for x in folder.glob("**/*") if x.is_file()) > 20_000_000
    defaults = {"precision": "bf16", "kv_cache": "bf16", "attention": "bf16", "decoder": "auto", "text_encoder": "bf16"}
    assert model["formats"] == defaults


def test_a_model_that_does_not_fit_names_the_option_with_which_it_fits(
    gpus: SetFree, doctor_json: DoctorJson, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus(70.0)
    needed = doctor_json("--preset", WAN)["model"]["serve"]["devices"]["cuda:0"]["needed_bytes"]
    smaller = doctor_json("--preset", WAN, "--text-encoder", "cpu")["model"]["serve"]["devices"]["cuda:0"][
        "needed_bytes"
    ]
    gpus((needed - 2 * GB) / GB)
    model = doctor_json("--preset", WAN, code=1)["model"]
    assert model["serve"]["devices"]["cuda:0"]["fits"] is False
    assert model["serve"]["remedy"] == {"options": ["--text-encoder cpu"], "needed_bytes": {"cuda:0": smaller}}
    assert main(["doctor", "--preset", WAN]) == 1
    out = capsys.readouterr().out
    assert f"does not fit: {(needed - 2 * GB) / GB:.1f} GB are free, 2.0 GB are missing; with --text" in out
    price = "--text-encoder takes longer for each prompt"
    assert f"with --text-encoder cpu it fits into {smaller / GB:.1f} GB ({price})\n" in out


def test_a_model_that_fits_with_no_option_needs_more_memory(
    gpus: SetFree, doctor_json: DoctorJson, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus(5.0)
    assert doctor_json("--preset", WAN, code=1)["model"]["serve"]["remedy"] is None
    assert main(["doctor", "--preset", WAN]) == 1
    assert (
        "it does not fit with --text-encoder cpu --low-memory --decoder-precision fp8 --precision nvfp4-weights"
        " --kv-cache nvfp4 --offload-weights either; use a small --decoder or a GPU with more memory\n"
        in capsys.readouterr().out
    )


def test_loading_and_doctor_refuse_with_the_same_numbers(
    gpus: SetFree, doctor_json: DoctorJson, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus(0.5)
    model = doctor_json("--model", "tiny", code=1)["model"]["generate"]["devices"]["cuda:0"]
    assert main(["generate", "a red ball", "-o", "never.mp4"]) == 2
    needed = f"{model['needed_bytes'] / GB:.1f} GB"
    assert f"cuda:0 has 0.5 GB free; streaming needs about {needed}" in capsys.readouterr().err
    assert not Path("never.mp4").exists()


def test_generate_needs_less_than_serve_since_it_frees_the_text_encoder(
    gpus: SetFree, doctor_json: DoctorJson, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus(40.0)
    model = doctor_json("--preset", WAN, code=1)["model"]
    generating, serving = (model[command]["devices"]["cuda:0"] for command in ("generate", "serve"))
    assert serving["needed_bytes"] - generating["needed_bytes"] == serving["parts"]["text encoder"] > 11 * GB
    assert "text encoder" not in generating["parts"]
    assert (generating["fits"], model["generate"]["remedy"]) == (True, None)
    assert (serving["fits"], model["serve"]["remedy"]["options"]) == (False, ["--text-encoder cpu"])
    assert main(["doctor", "--preset", WAN]) == 1
    out = capsys.readouterr().out
    assert f"cuda:0 for longvideo generate with {WAN}\n" in out and f"cuda:0 for longvideo serve with {WAN}\n" in out


def test_settings_for_gpus_of_common_sizes_are_listed(
    doctor_json: DoctorJson, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {row["options"]: row for row in doctor_json()["settings"]}
    needed = settings[""]["generate_bytes"]
    assert doctor_json("--preset", WAN)["model"]["generate"]["devices"]["cuda:0"]["needed_bytes"] == needed
    for size in (12, 16, 24, 32, 48, 80):
        assert any(row["serve_bytes"] <= size * GB for row in settings.values())
    assert all(row["generate_bytes"] <= row["serve_bytes"] for row in settings.values())
    assert main(["doctor"]) == 0
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines() if line.startswith("(no option)")]
    assert [row[-1].strip() for row in rows] == ["48, 80", "80"]


@without_gpu
def test_a_machine_without_a_gpu_gets_the_needed_memory(
    doctor_json: DoctorJson, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--preset", WAN, "--device", "cuda", "--decode-device", "cuda:1", "--decode-share", "0.1")
    devices = doctor_json(*options)["model"]["serve"]["devices"]
    assert [(device["fits"], device["free_bytes"]) for device in devices.values()] == [(None, None)] * 2
    assert main(["doctor", *options]) == 0
    out = capsys.readouterr().out
    for device in devices.values():
        above = -(-device["needed_bytes"] // 10**8) / 10  # rounded up
        assert f"torch finds no GPU on this machine; a GPU with {above:.1f} GB of free memory is needed\n" in out


@without_gpu
def test_a_small_decoder_is_named_and_needs_less(
    doctor_json: DoctorJson, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, small = (doctor_json("--preset", WAN, *more)["model"] for more in ((), ("--decoder", "taew2_2")))
    assert (own["decoder"], small["decoder"]) == ("the autoencoder", "taew2_2")
    assert small["serve"]["devices"]["cuda:0"]["needed_bytes"] < own["serve"]["devices"]["cuda:0"]["needed_bytes"] - 5e9
    shared = ("--decoder", "taew2_2", "--decode-device", "cuda:1", "--decode-share", "0.1")
    assert main(["doctor", "--preset", WAN, *shared]) == 2
    assert "decode_share is 0.1, but the decoder is taew2_2, which runs on one device" in capsys.readouterr().err
    generating.save(tmp_path / "model", latent_channels=48, has_vae=False)
    file = save(tmp_path / "lighttaew2_2.pth", tiny_weights())
    options = ("--model", str(tmp_path / "model"), "--decoder", str(file))
    model = doctor_json(*options)["model"]
    assert model["decoder"] == "lighttae" and model["serve"]["devices"]["cuda:0"]["parts"]["decoder"] > 0
    assert main(["doctor", *options, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "decoding on cpu by lighttae in float32 or bfloat16, whichever is measured to be faster" in out


@without_gpu
def test_whether_a_gpu_of_another_machine_has_fp8_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--preset", WAN, "--precision", "fp8"]) == 0
    assert "whether that GPU supports fp8 is unknown here" in capsys.readouterr().out


def test_a_cpu_is_not_estimated(doctor_json: DoctorJson, capsys: pytest.CaptureFixture[str]) -> None:
    model = doctor_json("--model", "tiny", "--device", "cpu")["model"]
    assert (model["serve"]["devices"], model["not_estimated"]) == ({}, ["cpu"])
    assert main(["doctor", "--model", "tiny", "--device", "cpu"]) == 0
    assert "cpu: the memory of a CPU is not estimated" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "tiny", "--preset", "tiny"], "--model and --preset exclude each other"),
        (["--preset", "wan"], "preset is 'wan'; expected one of wan2.2-ti2v-5b, tiny"),
        (["--model", "tin"], "no model 'tin'"),
        (
            ["--model", "Wan-AI/Wan2.2"],
            "there is no folder or file 'Wan-AI/Wan2.2'; use a local model (doctor downloads nothing)",
        ),
        (["--model", "tiny", "--precision", "fp4"], "precision is 'fp4'; expected one of"),
        (["--model", "tiny", "--kv-cache", "fp8"], "kv_cache is 'fp8'; expected one of"),
        (["--model", "tiny", "--attention", "fp4"], "attention is 'fp4'; expected one of"),
        (["--model", "tiny", "--guidance", "-1"], "guidance is -1; expected a number from 0 to 50"),
        (["--model", "tiny", "--device", "tpu"], "'tpu' is not a device; use cpu, cuda or cuda:N"),
        (["--model", "tiny", "--device", "cpu", "--decode-share", "0.5"], "cpu both denoises and decodes"),
        (["--model", "tiny", "--device", "cuda:9", "--self-test"], "device 'cuda:9' does not exist"),
        (["--device", "cuda:9"], "device 'cuda:9' does not exist"),
        (["--precision", "fp8"], "name one with --model or --preset"),
        (["--decode-device", "cuda:1"], "name one with --model or --preset"),
    ],
)
def test_bad_options_are_one_line_and_code_2(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *options]) == 2
    out, error = capsys.readouterr()
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert out == ""


def test_a_second_gpu_that_does_not_exist_is_an_error(gpus: SetFree, capsys: pytest.CaptureFixture[str]) -> None:
    gpus(70.0)
    assert main(["doctor", "--preset", WAN, "--decode-device", "cuda:1"]) == 2
    assert "device 'cuda:1' does not exist: this machine has 1 CUDA devices" in capsys.readouterr().err


@pytest.mark.gpu
def test_tiny_fits_on_a_real_gpu_and_its_checks_pass(doctor_json: DoctorJson) -> None:
    report = doctor_json("--model", "tiny", "--self-test", "--device", "cuda")
    assert report["model"]["serve"]["devices"]["cuda:0"]["fits"] is True
    backends = {row["name"]: row["backend"] for row in report["operations"]}
    assert backends["norms and rotation between a transformer's products"] == "triton"
    assert backends["attention in bf16"] != "reference"
