"""The public interface of generation: load a model, then stream frames while the video is generated."""

from __future__ import annotations

import warnings
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from longvideo.checkpoint.choices import adapter_choices
from longvideo.checkpoint.chosen_adapters import open_choice
from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.picture_size import PictureSize
from longvideo.errors import UserError, shown
from longvideo.infer.batch import batch_scripts
from longvideo.infer.beginning import BeginningChoice
from longvideo.infer.fit.formats import check_hardware, start_line
from longvideo.infer.fit.placement import Placement
from longvideo.infer.history import HISTORY_CHUNKS, History
from longvideo.infer.loading import load_models
from longvideo.infer.options import SamplingOptions, check_path, whole_number
from longvideo.infer.planned_video import footage_history, planned_inputs
from longvideo.infer.prompt_rules import PromptRules, unknown_words_warning
from longvideo.infer.script import ChunkPlan, ChunkTiming, Script, ShotRequest, check_seconds, plan_chunks
from longvideo.infer.session import Session
from longvideo.infer.snapshot import SessionOptions, model_identity, read_snapshot
from longvideo.infer.stage_pool import StagePool
from longvideo.infer.timeline import LiveShot, LiveSteps, Shots, SwitchMode
from longvideo.infer.video_inputs import VideoInputs
from longvideo.quantization.number_formats import NumberFormats
from longvideo.rollout import branches

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from longvideo.infer.beginning import Beginning, FirstPicture
    from longvideo.infer.footage import FootageSource
    from longvideo.infer.generation import GeneratedChunk, Models
    from longvideo.infer.history import Past

MAX_HISTORY_CHUNKS = 2**31

__all__ = ["Script", "ShotRequest", "StreamingPipeline", "SwitchMode"]


class StreamingPipeline:
    """Generates videos from text, and from a first picture or footage if there is one, chunk by chunk.

    The same seed on the same device with the same data type gives the same bits. Buffers and CUDA graphs of a video are
    used again for the next one; a video that starts while another one is generated gets its own.
    """

    def __init__(self, models: Models) -> None:
        """Take loaded models; use `from_pretrained` to load them, or `load_models` for an opened folder."""
        self.stages = StagePool(models)

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
        decoder: str | None = None,
        decoder_precision: str = "auto",
        text_encoder: str | None = None,
        low_memory: bool = False,
        offload_weights: bool = False,
        size: str | None = None,
        adapters: Sequence[str | Path] = (),
    ) -> StreamingPipeline:
        """Load a model.

        name: name of a packaged model ("tiny"), a folder or file of any known format (docs/checkpoints.md), or an id of
        the Hugging Face hub. base: model with the parts that are missing in `name`. preset: name of the settings of a
        published model, such as "longlive-2.0-5b", in place of the model's own.
        device: device that denoises; None means CUDA if there is a GPU, else the CPU. decode_device: device that
        decodes, for example a second GPU, which decodes while the first one denoises; None means `device`.
        decode_share: fraction of the decoding that `device` does for `decode_device`, from 0 to below 1; None means 0.
        dtype: data type of everything that is not quantized; None means bfloat16 if the hardware supports it, else
        float32.
        precision: format of the transformer: "bf16", "fp8" or "nvfp4" (weights and inputs of the blocks in 8 or 4
        bits), or "nvfp4-weights"; None means the format of the files. kv_cache: format of the KV cache: "bf16",
        "nvfp4", or "nvfp4-mixed", in which sink and newest chunk are exact. attention: format of attention, "bf16"
        or "fp8"; the latter needs the package nvidia-cudnn-frontend and a GPU of compute capability 9.
        decoder: "wan" for the model's autoencoder, "small" for the small decoder in the model folder, or a file; None
        means the small one on a CPU, if there is one, else the autoencoder. decoder_precision: "fp32", "bf16" or "fp8";
        "auto" means bf16 on a GPU, and what is measured to be the fastest on a CPU.
        text_encoder: "cuda" for `device`, "cpu" for the CPU, or "fp8" or "nvfp4" for `device` with weights in 8 or 4
        bits; None means `device`. low_memory: whether denoising and decoding on one device never overlap and use the
        same memory, and the decoder has one buffer for all convolutions. offload_weights: whether the weights of the
        transformer's blocks stay in host memory, from which each block is copied to the device before it runs. Both
        take time and change no result. size: width and height of videos in pixels, such as "1280x704"; None means those
        of the model. adapters: LoRA files or folders that are added to the transformer in this order, each PATH or
        PATH:STRENGTH (docs/checkpoints.md).
        Raises UserError for a value that cannot be used, such as a device that does not exist, and CheckpointError for
        files that are missing, damaged or do not fit.
        """
        formats = NumberFormats.parse(precision, kv_cache, attention, decoder_precision, text_encoder)
        placement = Placement.choose(
            device,
            decode_device,
            decode_share,
            dtype,
            text_encoder,
            low_memory=low_memory,
            offload_weights=offload_weights,
        )
        check_hardware(formats, placement)  # before a model is downloaded
        check_path(name, "the model")
        if base is not None:
            check_path(base, "base")
        picture_size = None if size is None else PictureSize.parse(size)
        folder = ModelFolder.open(name, base=base, preset=preset, adapters=adapter_choices(adapters))
        if picture_size is not None:
            folder = folder.resized(picture_size)
        return cls(load_models(folder, placement, formats=formats, decoder_name=decoder))

    def set_adapters(self, adapters: Sequence[str | Path]) -> None:
        """Use these adapters in all later videos, in place of all that the model has; an empty list removes them.

        adapters: as in `from_pretrained`. The transformer is read from its files again, after the old weights are
        freed: its bits are those of a new pipeline with these adapters, it takes the time of loading, no more memory
        than loading, and no copy of weights without adapters is kept.
        Raises UserError while a video is generated, for a model without files and, before any weight is read, where a
        GPU has too little memory; CheckpointError for adapters that cannot be used. The earlier adapters then stay.
        """
        folder = self.models.folder
        if folder is None:
            raise UserError("the model has random weights; use adapters with a model that was loaded from files")
        changed = folder.with_other_adapters([open_choice(one) for one in adapter_choices(adapters)])
        self.stages.replace_transformer(changed)

    @property
    def formats(self) -> NumberFormats:
        """The number formats in which this pipeline computes."""
        return self.models.formats

    @property
    def models(self) -> Models:
        """The loaded parts of the model."""
        return self.stages.models

    def start_line(self) -> str:
        """Return one line with the devices, the backends, what is emulated, and the adapters."""
        models = self.models
        line = start_line(models.formats, models.placement, packed=False, decoder=models.decoder.name)
        return " | ".join([line, *([f"adapters: {', '.join(models.adapters)}"] if models.adapters else [])])

    @property
    def fps(self) -> int:
        """Frames per second of every video."""
        return self.models.settings.fps

    @property
    def chunk_timing(self) -> ChunkTiming:
        """How pixel frames are divided into chunks."""
        return ChunkTiming.of(self.models.settings, self.models.decoder.config)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Shape of the latents of a chunk, [C, T, H, W]."""
        config, spec = self.models.transformer.config, self.models.spec
        _, p, q = config.patch_size
        return config.in_channels, spec.chunk_frames, p * spec.grid_height, q * spec.grid_width

    def plan(
        self, prompts: str | Sequence[str] | Script, *, seconds: float | None = None, continues: bool = False
    ) -> ChunkPlan:
        """Return the chunks that `stream` generates from the same prompts and seconds.

        continues: whether they continue a video; they are numbered from 0 either way.
        """
        timing = self.chunk_timing.after_footage if continues else self.chunk_timing
        return plan_chunks(Script.from_prompts(prompts, seconds=seconds), timing)

    def stream(
        self,
        prompts: str | Sequence[str] | Script,
        *,
        seconds: float | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        image: FirstPicture | None = None,
        video: FootageSource | None = None,
        video_seconds: float | None = None,
        negative_prompt: str = "",
    ) -> Generator[np.ndarray, None, None]:
        """Generate a video; yield frames, uint8 [T, H, W, 3], chunk by chunk.

        prompts: a prompt for each shot; the shots have equal lengths. Or a Script, which has its own lengths. seconds:
        length of the whole video; None with a Script. steps: number of solver steps for each chunk. guidance: scale of
        classifier-free guidance. None means the model's own for both. seed: seed of the noise. image: first frame: a
        file, a Pillow image, or uint8 [H, W, 3] of numpy or torch; it is scaled and cropped to the size of the video.
        video: footage that the video continues, without being part of it: a file, or uint8 [T, H, W, 3] at the model's
        frame rate. Its last whole chunks are used. video_seconds: length of them at most; None means as much as the
        model attends to. negative_prompt: text that guidance leads away from, in shots that state none; it needs
        guidance other than 1.
        Raises UserError for a value that cannot be used, when it is called and not while iterating. Warns (UserWarning)
        about words that the model has not learned, and about a picture or video that its autoencoder cannot hold.
        """
        script = Script.from_prompts(prompts, seconds=seconds, negative_prompt=negative_prompt)
        options = SamplingOptions(steps, guidance, seed)
        self.prompt_rules(options).check_script(script)
        self._warn_unknown_words(script.texts)
        beginning = BeginningChoice(image, video, video_seconds).encode(self.models)
        return _frames_only(self._video(script, options, beginning))

    def stream_chunks(
        self,
        prompts: str | Sequence[str] | Script,
        *,
        seconds: float | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        image: FirstPicture | None = None,
        video: FootageSource | None = None,
        video_seconds: float | None = None,
        negative_prompt: str = "",
    ) -> Generator[GeneratedChunk, None, None]:
        """Generate a video; yield its chunks, with frames and latents. Arguments and errors are those of `stream`.

        The first chunk is returned twice: with its first frame, and with the others. Chunks that continue a video are
        numbered after its chunks, and all are returned once.
        """
        script = Script.from_prompts(prompts, seconds=seconds, negative_prompt=negative_prompt)
        options = SamplingOptions(steps, guidance, seed)
        self.prompt_rules(options).check_script(script)
        self._warn_unknown_words(script.texts)
        return self._video(script, options, BeginningChoice(image, video, video_seconds).encode(self.models))

    def session(
        self,
        prompt: str,
        *,
        seconds: float | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        image: FirstPicture | None = None,
        video: FootageSource | None = None,
        video_seconds: float | None = None,
        negative_prompt: str = "",
        history_chunks: int = HISTORY_CHUNKS,
    ) -> Session:
        """Start a video that is steered while it is generated. Arguments and errors are those of `stream`.

        seconds: length of the video; None means that it has no end. The chunks of a `video` that is continued are the
        first ones of the session, with the first prompt; `seek` cannot change them. history_chunks: number of the
        latest chunks that `seek` can go back to; their latents are stored in host memory. Those that the next chunk
        needs are always stored.
        """
        history_chunks = whole_number(history_chunks, "history_chunks", 0, MAX_HISTORY_CHUNKS)
        if seconds is not None:
            check_seconds(seconds, "the video")
        sampling, shot = SamplingOptions(steps, guidance, seed), LiveShot(prompt, negative_prompt=negative_prompt)
        self.prompt_rules(sampling).check_shot(shot)
        beginning = BeginningChoice(image, video, video_seconds).encode(self.models)
        footage = beginning.footage
        footage_frames = self.chunk_timing.start(len(footage))
        options = SessionOptions(
            sampling,
            model_identity(self.models),
            None if seconds is None else footage_frames + max(1, round(seconds * self.fps)),
            beginning.first_latent,
            self.models.decoder_label,
            len(footage),
        )
        generators = [torch.Generator().manual_seed(sampling.seed)]
        history = footage_history(self.models, footage, [shot], generators=generators, capacity=history_chunks)
        session = self._session({0: shot}, options, history)
        session.notice = beginning.warning
        self._warn_unknown_words([prompt, negative_prompt])
        return session

    def restore(self, path: Path | str) -> Session:
        """Continue a session after the last chunk that it had returned when its snapshot was written.

        path: file that `Session.snapshot` wrote.
        Raises UserError for any other file, and for a snapshot of a model with other sizes or settings. Warns
        (UserWarning) if the frames so far came from another decoder.
        """
        check_path(path, "the snapshot")
        snapshot = read_snapshot(Path(path), model=model_identity(self.models), latent_shape=self.latent_shape)
        history = History(
            self.models.spec,
            decode_lookback=self.models.decoder.lookback,
            capacity=HISTORY_CHUNKS,
            steps=snapshot.steps,
            records=snapshot.records,
        )
        before, now = snapshot.options.decoder, self.models.decoder_label
        session = self._session(snapshot.shots, replace(snapshot.options, decoder=now), history)
        if before not in ("", now):
            session.notice = f"the frames so far were decoded by {shown(before)}; the session continues with {now}"
            warnings.warn(session.notice, UserWarning, stacklevel=2)
        return session

    def generate_batch(
        self,
        prompts: Sequence[Sequence[str]],
        *,
        seconds: Sequence[float],
        seeds: Sequence[int],
        steps: int | None = None,
        guidance: float | None = None,
        image: FirstPicture | None = None,
        video: FootageSource | None = None,
        video_seconds: float | None = None,
        negative_prompt: str = "",
    ) -> np.ndarray:
        """Generate several videos of equal length together; return frames, uint8 [B, T, H, W, 3].

        prompts: for every video, a prompt for each shot. seconds: length of each shot, the same in all videos. seeds:
        seed of each video; its noise depends on no other seed. The others are those of `stream`, for all videos: every
        video begins with the same picture, or continues the same footage.
        """
        scripts = batch_scripts(prompts, seconds, seeds, negative_prompt)
        options = [SamplingOptions(steps, guidance, seed) for seed in seeds]
        for script in scripts:
            self.prompt_rules(options[0]).check_script(script)
        generators = [torch.Generator().manual_seed(own.seed) for own in options]
        beginning = BeginningChoice(image, video, video_seconds).encode(self.models)
        inputs = planned_inputs(self.models, scripts, options[0], generators=generators, beginning=beginning)
        self._warn_unknown_words([text for script in scripts for text in script.texts])
        return np.concatenate([chunk.frames for chunk in self.generate(inputs)], axis=1)

    def _video(
        self, script: Script, options: SamplingOptions, beginning: Beginning
    ) -> Generator[GeneratedChunk, None, None]:
        generators = [torch.Generator().manual_seed(options.seed)]
        return self.generate(planned_inputs(self.models, [script], options, generators=generators, beginning=beginning))

    def _session(self, shots: Shots, options: SessionOptions, history: History) -> Session:
        sampling, check = options.sampling, self.prompt_rules(options.sampling).check_shot

        def generate(steps: LiveSteps, past: Past | None) -> Generator[GeneratedChunk, None, None]:
            if options.model != model_identity(self.models):
                raise UserError("the adapters have changed since the session began; start another session")
            generators = past.generators if past else [torch.Generator().manual_seed(sampling.seed)]
            inputs = VideoInputs.of(
                steps,
                self.models.settings,
                sampling,
                generators=generators,
                first_latent=options.first_latent,
                past=past,
            )
            return self.generate(inputs)

        return Session(
            LiveSteps(shots, self.chunk_timing, check=check, num_frames=options.num_frames, first=len(history)),
            options,
            history,
            generate=generate,
            check_words=lambda *texts: self._warn_unknown_words(texts),
        )

    def generate(self, inputs: VideoInputs) -> Generator[GeneratedChunk, None, None]:
        """Generate a video, or a batch of videos, from inputs that are already checked; yield its chunks.

        The first chunk is returned twice, as in `stream_chunks`.
        """
        return self.stages.generate(inputs)

    def warm_up(self) -> None:
        """Prepare the first video with the model's own guidance, so that it does not wait for compilation."""
        self.stages.release(self.stages.acquire(batch=1, copies=branches(self.models.settings.guidance)))

    def prompt_rules(self, options: SamplingOptions) -> PromptRules:
        """Return the rules for the prompts of a video."""
        return PromptRules(self.models.text_encoder, self.models.settings, guidance=options.guidance)

    def unknown_words_warning(self, prompts: Sequence[str]) -> str | None:
        """Return a warning that names the words of prompts that the model's vocabulary does not contain, or None."""
        return unknown_words_warning(self.models.text_encoder, prompts)

    def _warn_unknown_words(self, prompts: Sequence[str]) -> None:
        if message := self.unknown_words_warning(prompts):
            warnings.warn(message, UserWarning, stacklevel=3)


def _frames_only(chunks: Generator[GeneratedChunk, None, None]) -> Generator[np.ndarray, None, None]:
    with closing(chunks):
        for chunk in chunks:
            yield chunk.frames[0]
