"""The public way to make videos: load a model folder, then stream frames as they are made."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from longvideo.checkpoint.folder import ModelFolder
from longvideo.errors import UserError
from longvideo.flow.unipc import UniPC
from longvideo.infer.fit.formats import check_formats, check_hardware, start_line
from longvideo.infer.fit.memory import Workload
from longvideo.infer.fit.placement import Placement
from longvideo.infer.fit.refusal import check_memory
from longvideo.infer.fit.shapes import folder_shapes
from longvideo.infer.generation import GeneratedChunk, Models, Stages, VideoInputs, encode_first_frame, generate_chunks
from longvideo.infer.history import HISTORY_CHUNKS, ChunkRecord, History, Past
from longvideo.infer.options import SamplingOptions, check_path, shown, whole_number
from longvideo.infer.script import (
    ChunkPlan,
    ChunkTiming,
    Script,
    ShotRequest,
    check_prompt,
    check_seconds,
    plan_chunks,
)
from longvideo.infer.session import Session
from longvideo.infer.snapshot import SessionOptions, read_snapshot
from longvideo.infer.timeline import Shots, Step, SwitchMode, planned_steps
from longvideo.quantization.convert import with_precision
from longvideo.quantization.number_formats import NumberFormats
from longvideo.rollout import branches
from longvideo.vae.halo import decode_lookback

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch.distributed import ProcessGroup

    from longvideo.checkpoint.settings import ModelSettings
    from longvideo.vae.config import AutoencoderConfig

DEFAULT_FORMATS = NumberFormats()
MAX_HISTORY_CHUNKS = 2**31
FirstPicture: TypeAlias = "Path | str | np.ndarray | Tensor | Image"

__all__ = ["Script", "ShotRequest", "StreamingPipeline", "SwitchMode"]


class StreamingPipeline:
    """Text (and an optional first picture) to video, chunk by chunk.

    Same seed, same device and dtype, same bits. What makes a video is kept for the next one; a video that is begun
    while another is being made gets a cache of its own.
    """

    def __init__(self, models: Models) -> None:
        self.models = models
        self._idle: Stages | None = None
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = "tiny",
        *,
        base: str | Path | None = None,
        preset: str | None = None,
        device: str | torch.device | None = None,
        decode_device: str | torch.device | None = None,
        decode_share: float | None = None,
        dtype: torch.dtype | None = None,
        precision: str | None = None,
        kv_cache: str = "bf16",
        attention: str = "bf16",
    ) -> StreamingPipeline:
        """Load a shipped name ("tiny"), a folder or file of any known format (docs/checkpoints.md), or a hub id.

        base: model from which missing parts come. preset: settings of a published model, `longlive-2.0-5b`, in place of
        the model's own.
        device: CUDA if there is one, else the CPU. decode_device: where pixels are made, by default the same; another
        GPU decodes while the first denoises. decode_share: of that GPU's work, what `device` does instead, from 0 to
        below 1; None for 0. dtype: bfloat16 where the hardware multiplies it, else float32.
        precision: "bf16", "fp8" or "nvfp4" (weights and inputs of the blocks in 8 or 4 bits), or "nvfp4-weights"; by
        default what the folder holds. kv_cache: "bf16" or "nvfp4", how the chunks already made are kept.
        attention: "bf16", or "fp8", which takes NVIDIA's package nvidia-cudnn-frontend on a GPU.
        Raises UserError when the device is not there, CheckpointError when the folder is not whole.
        """
        formats = NumberFormats(precision, kv_cache, attention)
        placement = Placement.choose(device, decode_device, decode_share, dtype)
        check_hardware(formats, device=placement.device)  # before a model is downloaded
        check_path(name, "the model")
        if base is not None:
            check_path(base, "base")
        return cls.load(ModelFolder.open(name, base=base, preset=preset), placement, formats=formats)

    @classmethod
    def load(
        cls,
        folder: ModelFolder,
        placement: Placement,
        *,
        formats: NumberFormats = DEFAULT_FORMATS,
        group: ProcessGroup | None = None,
    ) -> StreamingPipeline:
        """Load the weights of an opened folder.

        group: ranks that share the denoising of every chunk (`longvideo.streaming.parallel`). All of them make the same
        calls, and the first gets the frames.
        Raises UserError before any is read where a GPU has too little memory free.
        """
        check_formats(folder, formats, device=placement.device)
        check_memory(Workload(shapes=folder_shapes(folder), formats=formats, placement=placement))
        denoising = {"device": placement.device, "dtype": placement.denoise_dtype}
        decoding = {"device": placement.decode_device, "dtype": placement.decode_dtype}
        with ThreadPoolExecutor() as pool:
            text_encoder = pool.submit(folder.load_text_encoder, **denoising)
            transformer = pool.submit(folder.load_transformer, **denoising)
            autoencoder = pool.submit(folder.load_vae, **decoding)
            models = Models(
                transformer=with_precision(transformer.result(), formats.precision),
                autoencoder=autoencoder.result(),
                text_encoder=text_encoder.result(),
                settings=folder.settings,
                spec=folder.spec,
                placement=placement,
                formats=replace(formats, precision=formats.precision_of(packed=folder.is_packed)),
                group=group,
            )
        return cls(models)

    @property
    def formats(self) -> NumberFormats:
        """The number formats in which this pipeline computes."""
        return self.models.formats

    def start_line(self) -> str:
        """Say in one line what runs, where, and what of it is emulated."""
        return start_line(self.models.formats, self.models.placement, packed=False)

    @property
    def fps(self) -> int:
        """Frames a second of every video this model makes."""
        return self.models.settings.fps

    @property
    def chunk_timing(self) -> ChunkTiming:
        """How this model's chunks divide pixel frames."""
        return chunk_timing(self.models.settings, self.models.autoencoder.config)

    def plan(self, prompts: str | Sequence[str] | Script, *, seconds: float | None = None) -> ChunkPlan:
        """Return the chunks that `stream` would make of the same prompts and seconds."""
        return plan_chunks(as_script(prompts, seconds), self.chunk_timing)

    def stream(
        self,
        prompts: str | Sequence[str] | Script,
        *,
        seconds: float | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        image: FirstPicture | None = None,
    ) -> Generator[np.ndarray, None, None]:
        """Yield frames, uint8 [T, H, W, 3], chunk by chunk as they are made.

        prompts: one prompt a shot, each shown equally long, `seconds` in all; or a Script, which has its own lengths.
        steps, guidance: None takes the model's own. image: first frame, a file, a Pillow image, or uint8 [H, W, 3] of
        numpy or torch; it is scaled and its center cropped to the video's size. Wrong values raise UserError here, not
        when iterating; words that the model never learned give a UserWarning.
        """
        script = as_script(prompts, seconds)
        options = SamplingOptions(steps, guidance, seed)
        shots = [shot.prompt for shot in script.shots]
        timeline = planned_steps(plan_chunks(script, self.chunk_timing), [shots])
        self._warn_unknown_words(shots)
        inputs = self._inputs(timeline, options, [options.seed], first_latent=self._first_latent(image))
        return _frames_only(self._generate(inputs))

    def session(
        self,
        prompt: str,
        *,
        seconds: float | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        image: FirstPicture | None = None,
        history_chunks: int = HISTORY_CHUNKS,
    ) -> Session:
        """Start a video that is steered while it is made. Without `seconds` it has no end. Arguments as in `stream`.

        history_chunks: how far back `seek` can go; a chunk that can be gone back to keeps its latents in host memory.
        What the next chunk needs is kept in any case.
        """
        check_prompt(prompt, "the prompt")
        history_chunks = whole_number(history_chunks, "history_chunks", 0, MAX_HISTORY_CHUNKS)
        if seconds is not None:
            check_seconds(seconds, "the video")
        options = SessionOptions(
            SamplingOptions(steps, guidance, seed),
            self._fingerprint,
            None if seconds is None else max(1, round(seconds * self.fps)),
            self._first_latent(image),
        )
        self._warn_unknown_words([prompt])
        return self._session({0: (prompt, "cut")}, options, self._new_history(history_chunks))

    def restore(self, path: Path | str) -> Session:
        """Continue a session after the last chunk that it had handed out when its `snapshot` was written.

        Raises UserError for another file, and for a snapshot of a model with other sizes or settings.
        """
        check_path(path, "the snapshot")
        config, spec = self.models.transformer.config, self.models.spec
        _, p, q = config.patch_size
        latent_shape = (config.in_channels, spec.chunk_frames, p * spec.grid_height, q * spec.grid_width)
        snapshot = read_snapshot(Path(path), model=self._fingerprint, latent_shape=latent_shape)
        history = self._new_history(HISTORY_CHUNKS, snapshot.steps, snapshot.kept)
        return self._session(snapshot.shots, snapshot.options, history)

    def generate_batch(
        self,
        prompts: Sequence[Sequence[str]],
        *,
        seconds: Sequence[float],
        seeds: Sequence[int],
        steps: int | None = None,
        guidance: float | None = None,
    ) -> np.ndarray:
        """Make several videos of equal length together; return uint8 [B, T, H, W, 3].

        prompts: for every video, a prompt per shot. seconds: of every shot, the same for all videos.
        A video's noise depends on its own seed alone.
        """
        for name, values in (("prompts", prompts), ("seconds", seconds), ("seeds", seeds), *_named_shots(prompts)):
            is_number = isinstance(values, np.ndarray) and not values.ndim
            if is_number or isinstance(values, str) or not isinstance(values, Sequence | np.ndarray):
                raise UserError(f"{name} is {shown(values)}; give a sequence, with one item for each video or shot")
        if not len(prompts) or len(prompts) != len(seeds):
            raise UserError(f"{len(prompts)} videos and {len(seeds)} seeds were given; give one seed for each video")
        if any(len(shots) != len(seconds) for shots in prompts):
            raise UserError(f"every video needs {len(seconds)} prompts, one for each length in seconds")
        scripts = [Script(tuple(map(ShotRequest, shots, seconds))) for shots in prompts]
        options = [SamplingOptions(steps, guidance, seed) for seed in seeds]
        timeline = planned_steps(plan_chunks(scripts[0], self.chunk_timing), prompts)
        self._warn_unknown_words([prompt for shots in prompts for prompt in shots])
        inputs = self._inputs(timeline, options[0], [option.seed for option in options])
        return np.concatenate([chunk.frames for chunk in self._generate(inputs)], axis=1)

    def _session(self, shots: Shots, options: SessionOptions, history: History) -> Session:
        return Session(
            shots,
            options,
            history,
            timing=self.chunk_timing,
            generate=lambda steps, past: self._generate(
                self._inputs(
                    steps, options.sampling, [options.sampling.seed], first_latent=options.first_latent, past=past
                )
            ),
            check_words=lambda changed: self._warn_unknown_words([changed]),
        )

    def _new_history(self, capacity: int, steps: Sequence[Step] = (), kept: Sequence[ChunkRecord] = ()) -> History:
        lookback = decode_lookback(self.models.autoencoder.config)
        return History(self.models.spec, decode_lookback=lookback, capacity=capacity, steps=steps, kept=kept)

    @property
    def _fingerprint(self) -> dict[str, Any]:
        transformer = asdict(self.models.transformer.config)
        return json.loads(json.dumps({**asdict(self.models.settings), **transformer}))  # as a file gives it back

    def _inputs(
        self,
        steps: Iterator[Step],
        options: SamplingOptions,
        seeds: Sequence[int],
        *,
        first_latent: Tensor | None = None,
        past: Past | None = None,
    ) -> VideoInputs:
        settings = self.models.settings
        return VideoInputs(
            steps=steps,
            solver=UniPC(settings.steps if options.steps is None else options.steps, settings.shift),
            guidance=settings.guidance if options.guidance is None else options.guidance,
            generators=past.generators if past else tuple(torch.Generator().manual_seed(seed) for seed in seeds),
            first_latent=first_latent,
            past=past,
        )

    def _generate(self, inputs: VideoInputs) -> Generator[GeneratedChunk, None, None]:
        stages = self.acquire(batch=len(inputs.generators), copies=branches(inputs.guidance))
        chunks = generate_chunks(self.models, stages, inputs)
        try:
            with closing(chunks):
                yield from chunks
        except GeneratorExit:  # the caller has seen enough
            self.release(stages)
            raise
        self.release(stages)  # not after an error, which may have left anything behind

    def warm_up(self) -> None:
        """Build, compile and record what the first video with the model's own guidance would wait for."""
        self.release(self.acquire(batch=1, copies=branches(self.models.settings.guidance)))

    def acquire(self, *, batch: int, copies: int) -> Stages:
        """Return what makes a video: what an earlier one left, or built and warmed up now. See `Stages`."""
        with self._lock:
            stages, self._idle = self._idle, None
        if stages is None or stages.size != (batch, copies):
            stages = None  # its memory is free before another takes as much
            stages = Stages(self.models, batch=batch, copies=copies)
        return stages

    def release(self, stages: Stages) -> None:
        """Keep stages for the next video; one is kept."""
        stages.reset()
        with self._lock:
            self._idle = stages

    def _first_latent(self, image: FirstPicture | None) -> Tensor | None:
        if image is None:
            return None
        from longvideo.data.pictures import as_picture

        size = (self.models.settings.height, self.models.settings.width)
        return encode_first_frame(self.models, as_picture(image, size=size))

    def _warn_unknown_words(self, prompts: Sequence[str]) -> None:
        unknown = dict.fromkeys(word for prompt in prompts for word in self.models.text_encoder.unknown_words(prompt))
        if unknown:
            words = ", ".join(repr(word) for word in unknown)
            warnings.warn(f"the model never learned {words}; expect something else there", UserWarning, stacklevel=3)


def as_script(prompts: str | Sequence[str] | Script, seconds: float | None) -> Script:
    """Make a Script of prompts that share `seconds`; a Script is returned as it is, and must come without seconds."""
    if isinstance(prompts, Script):
        if seconds is not None:
            raise UserError("a script has the length of each shot; leave seconds out")
        return prompts
    if seconds is None:
        raise UserError("seconds is missing: say how long the video shall be")
    return Script.from_prompts(prompts, seconds=seconds)


def chunk_timing(settings: ModelSettings, autoencoder: AutoencoderConfig) -> ChunkTiming:
    """Return how a model's chunks divide pixel frames."""
    scale = autoencoder.scale_factor_temporal
    return ChunkTiming.of(chunk_frames=settings.chunk_frames, temporal_scale=scale, fps=settings.fps)


def _named_shots(prompts: object) -> list[tuple[str, object]]:
    videos = prompts if isinstance(prompts, Sequence) else ()
    return [(f"prompts[{index}]", shots) for index, shots in enumerate(videos)]


def _frames_only(chunks: Generator[GeneratedChunk, None, None]) -> Generator[np.ndarray, None, None]:
    with closing(chunks):
        for chunk in chunks:
            yield chunk.frames[0]
