"""`longvideo serve`: a page, live streams and jobs over HTTP."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longvideo.checkpoint.choices import adapter_choices
from longvideo.cli.model_options import (
    AdapterNames,
    AttentionFormat,
    Base,
    DecodeDevice,
    DecoderFormat,
    DecoderName,
    DecodeShare,
    Device,
    DeviceChoice,
    Entry,
    KVCacheFormat,
    LowMemory,
    ModelChoice,
    ModelName,
    OffloadWeights,
    Precision,
    SettingsPreset,
    Size,
    TextEncoderChoice,
    one_decoder,
)
from longvideo.machine.packages import require

if TYPE_CHECKING:
    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.infer.fit.placement import Placement
    from longvideo.infer.pipeline import StreamingPipeline
    from longvideo.quantization.number_formats import NumberFormats


def serve(
    model: ModelName = "tiny",
    base: Base = None,
    preset: SettingsPreset = None,
    entry: Entry = None,
    size: Size = None,
    adapter: AdapterNames = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Addresses that other machines reach need `--token`.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 selects a free port.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="LONGVIDEO_TOKEN",
            show_envvar=True,
            help="Secret that every client must send. Other clients are refused.",
        ),
    ] = None,
    public_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Host name of a reverse proxy on this machine, such as video.example.org; may be repeated."
            " With a token, every host name is accepted."
        ),
    ] = None,
    folder: Annotated[
        Path, typer.Option(help="Folder for videos and the list of jobs, readable by this user only.")
    ] = Path("served"),
    max_sessions: Annotated[
        int,
        typer.Option(
            min=1, help="Maximum number of live videos at the same time. Each needs its own memory, and so does a job."
        ),
    ] = 2,
    max_seconds: Annotated[
        float,
        typer.Option(
            min=1, max=86400, help="Maximum length of a live video in seconds. A video without a length ends there."
        ),
    ] = 3600.0,
    device: Device = None,
    decode_device: DecodeDevice = None,
    decode_share: DecodeShare = None,
    precision: Precision = None,
    kv_cache: KVCacheFormat = "bf16",
    attention: AttentionFormat = "bf16",
    decoder: DecoderName = None,
    decoder_precision: DecoderFormat = "auto",
    text_encoder: TextEncoderChoice = None,
    low_memory: LowMemory = False,
    offload_weights: OffloadWeights = False,
) -> None:
    """Serve a page that plays videos while they are generated, and changes their prompts.

    `longvideo serve`, then open http://127.0.0.1:8000: type a prompt, watch, and change the prompt while it runs.

    `longvideo serve --model FOLDER --host 0.0.0.0 --token "$(openssl rand -hex 16)"` accepts clients on other machines.
    The token and the video are not encrypted: outside of a trusted network, add a reverse proxy with TLS.

    Programs use the same server: live streams over the WebSocket `/v1/stream`, jobs through `POST /v1/videos`. The
    protocol is described in docs/server.md and `/openapi.json`. Videos are MP4 files in `--folder`. After Ctrl-C and a
    new start, live videos can be continued and queued jobs are generated.
    """
    from longvideo.quantization.number_formats import NumberFormats

    choice = ModelChoice(model, base, preset, entry, size, adapter_choices(adapter or []))
    decoder_name = one_decoder(decoder)
    formats = NumberFormats.parse(precision, kv_cache, attention, decoder_precision, text_encoder)
    for package in ("fastapi", "uvicorn", "httptools", "python_multipart"):
        require(package, extra="serve", purpose="longvideo serve")
    from longvideo.infer.server.limits import Limits, ServerSettings
    from longvideo.infer.server.run import VideoServer, listen
    from longvideo.infer.server.security import check_listening, check_public_hosts
    from longvideo.infer.server.served_folder import served_folder

    check_listening(host, token)
    settings = ServerSettings(
        folder=folder,
        model=model if model == "tiny" else Path(model).resolve().name,
        token=token,
        public_hosts=check_public_hosts(public_host or []),
        limits=Limits(sessions=max_sessions, stream_seconds=max_seconds),
    )
    devices = DeviceChoice(device, decode_device, decode_share, text_encoder, low_memory, offload_weights)
    placement = devices.place()
    with listen(host, port) as socket:
        print("loading", file=sys.stderr)
        model_folder = choice.open()
        with served_folder(folder):
            pipeline = _load(model_folder, placement, formats, decoder_name)
            print(pipeline.start_line(), file=sys.stderr)
            server = VideoServer(pipeline, settings)
            url_host = f"[{host}]" if ":" in host else host
            print(f"longvideo serves {settings.model} on http://{url_host}:{socket.getsockname()[1]}", flush=True)
            server.run([socket])


def _load(
    folder: ModelFolder, placement: Placement, formats: NumberFormats, decoder_name: str | None
) -> StreamingPipeline:
    import warnings

    from longvideo.infer.host_memory import release_large_blocks
    from longvideo.infer.loading import load_models
    from longvideo.infer.pipeline import StreamingPipeline

    # clients receive these warnings; the log of the server does not need them
    for message in ("the model's vocabulary does not contain", "the frames so far were decoded by"):
        warnings.filterwarnings("ignore", message=message, category=UserWarning)
    release_large_blocks()
    pipeline = StreamingPipeline(load_models(folder, placement, formats=formats, decoder_name=decoder_name))
    pipeline.warm_up()
    return pipeline
