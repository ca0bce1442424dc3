"""Generate with diffusers: a pipeline that is loaded, moved, adapted and called as diffusers' own pipelines are."""

from __future__ import annotations

import warnings
from dataclasses import asdict, replace
from itertools import count
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from torch import Tensor, nn

from longvideo.checkpoint.adapter_files import PEFT_CONFIG
from longvideo.checkpoint.adapters import Adapter
from longvideo.checkpoint.diffusers_folder import SETTINGS_FILE
from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.locations import is_local, locate
from longvideo.checkpoint.parts import TEXT_ENCODER, VAE
from longvideo.checkpoint.picture_size import PictureSize
from longvideo.checkpoint.settings import BOUNDS, ModelSettings
from longvideo.config.bounds import check_whole
from longvideo.errors import UserError
from longvideo.files import write_json
from longvideo.infer.beginning import BeginningChoice
from longvideo.infer.fit.placement import Placement
from longvideo.infer.loading import load_models
from longvideo.infer.options import SamplingOptions
from longvideo.infer.pipeline import StreamingPipeline
from longvideo.infer.planned_video import planned_inputs
from longvideo.integrations.diffusers_arguments import (
    TENSOR_INPUTS,
    CallOptions,
    check_noise,
    frames_of,
    generators_of,
    joined,
    scripts_of,
    with_negative_prompts,
)
from longvideo.integrations.diffusers_modules import model_folder, state_of, stored_settings
from longvideo.integrations.observed_solver import ObservedSolver
from longvideo.machine.packages import require
from longvideo.quantization.number_formats import DecoderPrecision, NumberFormats

if TYPE_CHECKING:
    from collections.abc import Generator, Hashable, Iterator

    from longvideo.infer.script import Script
    from longvideo.infer.timeline import Step
    from longvideo.integrations.diffusers_arguments import Frames

DECODER_PRECISIONS: dict[torch.dtype, DecoderPrecision] = {torch.float32: "fp32", torch.bfloat16: "bf16"}
DOWNLOAD_OPTIONS = ("revision", "cache_dir", "token", "force_download", "proxies")


class CausalWanPipeline(DiffusionPipeline, WanLoraLoaderMixin):
    """Text to video with a causal Wan model, chunk by chunk.

    The pipeline holds the modules that diffusers loads: WanTransformer3DModel, AutoencoderKLWan, UMT5EncoderModel. So
    `from_pretrained`, `components`, `to`, `save_pretrained` and all calls for LoRA are diffusers' own, and the pipeline
    can be a custom pipeline. These modules do not compute: diffusers' transformer has neither causal attention nor a
    cache. The first call builds a `StreamingPipeline` from their weights, sharing their memory except that of the
    self-attention's projections, and later calls use it again until a weight, an adapter, the device or the size
    changes. It computes on the device and in the data type of the transformer, and decodes on those of the autoencoder.
    The scheduler is not used: the solver is UniPC with the shift of the settings.
    """

    _optional_components = ["transformer_2"]
    _callback_tensor_inputs = list(TENSOR_INPUTS)

    def __init__(
        self,
        tokenizer: object,
        text_encoder: nn.Module,
        vae: AutoencoderKLWan,
        scheduler: object,
        transformer: WanTransformer3DModel,
        transformer_2: WanTransformer3DModel | None = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = True,
        settings: ModelSettings | None = None,
    ) -> None:
        """Take loaded modules; use `from_pretrained` to load them.

        settings: sizes of chunk and window and defaults of generation; None means those in longvideo.json of the folder
        that the pipeline was loaded from, and those of Wan2.2-TI2V-5B for a folder without that file.
        Raises UserError for two transformers, as Wan2.2's 14B has.
        """
        super().__init__()
        if transformer_2 is not None or boundary_ratio is not None:
            raise UserError("the model has two transformers, as Wan2.2's 14B; expected one, as Wan2.2-TI2V-5B has")
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            scheduler=scheduler,
            transformer=transformer,
            transformer_2=None,
        )
        self.register_to_config(boundary_ratio=None, expand_timesteps=expand_timesteps)
        self._own_settings = settings
        self._streaming: tuple[Hashable, StreamingPipeline] | None = None
        self._guidance_scale, self._num_timesteps, self._interrupt = 1.0, 0, False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> CausalWanPipeline:
        """Load a model: a packaged one ("tiny"), a folder in diffusers' layout, or an id of the Hugging Face hub.

        kwargs: arguments of `DiffusionPipeline.from_pretrained`, such as torch_dtype and variant, and `settings`.
        Raises UserError if transformers is not installed, and CheckpointError if there is no such model.
        """
        require("transformers", extra="diffusers", purpose="CausalWanPipeline.from_pretrained")
        name = str(pretrained_model_name_or_path)
        if not is_local(name) and (options := [option for option in DOWNLOAD_OPTIONS if option in kwargs]):
            raise UserError(
                f"{options[0]} is not supported; download {name} with huggingface_hub.snapshot_download and use its"
                " folder"
            )
        path = locate(name)
        modules = _modules_elsewhere(path, dtype=kwargs.get("torch_dtype", kwargs.get("dtype")))
        return super().from_pretrained(str(path), **{**modules, **kwargs})

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write a folder as `DiffusionPipeline.save_pretrained` does, with longvideo.json, which this project opens."""
        super().save_pretrained(save_directory, *args, **kwargs)
        write_json(Path(save_directory) / SETTINGS_FILE, asdict(self.settings))

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: str | dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> None:
        """Load a LoRA, as `WanLoraLoaderMixin.load_lora_weights` does; the next call generates with it.

        A folder that peft wrote, which diffusers does not read, is loaded too. Adapters that are active, with the
        weights of `set_adapters`, are added to the transformer's weights in float32 before that call. Raises UserError
        if peft is not installed.
        """
        require("peft", extra="diffusers", purpose="load_lora_weights")
        source = pretrained_model_name_or_path_or_dict
        with TemporaryDirectory() as temporary:
            if not isinstance(source, dict) and (Path(source) / PEFT_CONFIG).is_file():
                Adapter.load(Path(source)).save(Path(temporary), base="")  # with a file that diffusers reads
                source = temporary
            super().load_lora_weights(source, *args, **kwargs)

    @property
    def settings(self) -> ModelSettings:
        """The settings of the model.

        Raises UserError if they are unknown, since neither the constructor nor a folder provides them.
        """
        if self._own_settings is not None:
            return self._own_settings
        folder = self.config.get("_name_or_path")
        if folder is None or not Path(folder).is_dir():
            raise UserError(
                f"the settings of {folder or 'these modules'} are unknown, because they come from no folder; use"
                " CausalWanPipeline.from_pretrained, or pass settings"
            )
        return stored_settings(Path(folder))

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the latest call."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Number of denoising steps of the latest call, over all chunks."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the video ends after the chunk in progress; a callback may set `_interrupt`, as in diffusers."""
        return self._interrupt

    def __call__(
        self,
        prompt: str | list[str] | Script,
        negative_prompt: str | list[str] | None = None,
        *,
        return_dict: bool = True,
        **options: Any,
    ) -> WanPipelineOutput | tuple[Frames]:
        """Generate videos.

        prompt: text, a list with a text for each video of a batch, or a Script, which has shots and their lengths.
        negative_prompt: text that guidance leads away from, or one for each video. return_dict: whether to return
        WanPipelineOutput, with `frames`, or else a tuple of the frames. options: fields of `CallOptions`, such as
        num_frames and generator.
        Raises UserError for a value that cannot be used.
        """
        call = CallOptions(**options)
        frames = joined(list(self._generate(prompt, negative_prompt, call)), call.output_type)
        return WanPipelineOutput(frames=frames) if return_dict else (frames,)  # pyright: ignore[reportArgumentType]

    def stream(
        self, prompt: str | list[str] | Script, negative_prompt: str | list[str] | None = None, **options: Any
    ) -> Generator[Frames, None, None]:
        """Generate videos; yield their frames chunk by chunk.

        The first chunk comes in two parts, its first frame and then the others, unless it continues footage. The
        arguments are those of a call, without return_dict.
        Raises UserError for a value that cannot be used, when it is called and not while iterating.
        """
        return self._generate(prompt, negative_prompt, CallOptions(**options))

    def _generate(
        self, prompt: str | list[str] | Script, negative_prompt: str | list[str] | None, call: CallOptions
    ) -> Generator[Frames, None, None]:
        own_scripts = with_negative_prompts(scripts_of(prompt, call.num_frames, fps=self.settings.fps), negative_prompt)
        scripts = [script for script in own_scripts for _ in range(call.num_videos_per_prompt)]
        generators = generators_of(call.generator, len(scripts))
        streaming = self.streaming(height=call.height, width=call.width, max_sequence_length=call.max_sequence_length)
        model, sampling = streaming.models.settings, call.sampling
        steps = model.steps if sampling.steps is None else sampling.steps
        self._guidance_scale = max(1.0, model.guidance if sampling.guidance is None else sampling.guidance)
        options = SamplingOptions(steps, self._guidance_scale)
        rules = streaming.prompt_rules(options)
        for script in own_scripts:
            rules.check_script(script)
        plan = streaming.plan(scripts[0], continues=call.video is not None)
        check_noise(call.latents, (len(scripts), *streaming.latent_shape), plan.num_chunks)
        if message := streaming.unknown_words_warning([text for script in own_scripts for text in script.texts]):
            warnings.warn(message, UserWarning, stacklevel=3)
        beginning = BeginningChoice(call.image, call.video, call.video_seconds).encode(streaming.models)
        self._num_timesteps, self._interrupt = steps * plan.num_chunks, False
        progress = self.progress_bar(total=self._num_timesteps)  # pyright: ignore[reportCallIssue]
        numbers = count()

        def after_step(timestep: int, sample: Tensor) -> Tensor:
            progress.update()
            return call.after_step(self, next(numbers), timestep, sample)

        inputs = planned_inputs(streaming.models, scripts, options, generators=generators, beginning=beginning)
        solver = ObservedSolver(steps, model.shift, after_step=after_step, noise=call.latents)
        inputs = replace(inputs, steps=self._until_interrupted(inputs.steps), solver=solver)
        scale = streaming.models.decoder.config.scale_factor_temporal
        return frames_of(streaming.generate(inputs), call.output_type, progress, temporal_scale=scale)

    def streaming(
        self, *, height: int | None = None, width: int | None = None, max_sequence_length: int | None = None
    ) -> StreamingPipeline:
        """Return the pipeline that computes, for sessions and everything else that diffusers has no name for.

        The arguments are those of `CallOptions`. Raises UserError for modules and sizes that cannot be used.
        """
        settings = self.settings
        if max_sequence_length is not None:
            settings = replace(settings, text_len=max_sequence_length)
        size = PictureSize(settings.width if width is None else width, settings.height if height is None else height)
        check_whole("width", size.width, *BOUNDS["width"])
        check_whole("height", size.height, *BOUNDS["height"])
        weights = state_of(self.transformer, self.vae, self.text_encoder)
        state = settings, size, weights, self.tokenizer.name_or_path
        if self._streaming is None or self._streaming[0] != state:
            self._streaming = None  # its memory is freed before new memory is allocated
            folder = model_folder(
                self.transformer,
                self.vae,
                self.text_encoder,
                tokenizer=Path(self.tokenizer.name_or_path),
                settings=settings,
            ).resized(size)
            device, text_device = self.transformer.device, self.text_encoder.device
            placement = Placement.choose(
                device,
                self.vae.device,
                dtype=self.transformer.dtype,
                text_encoder="cpu" if text_device.type == "cpu" != device.type else None,
            )
            formats = NumberFormats(decoder=DECODER_PRECISIONS.get(self.vae.dtype, "auto"))
            models = load_models(folder, placement, formats=formats, decoder_name="wan")
            self._streaming = state, StreamingPipeline(models)
        return self._streaming[1]

    def _until_interrupted(self, steps: Iterator[Step]) -> Iterator[Step]:
        for step in steps:
            if self._interrupt:
                return
            yield step


def _modules_elsewhere(path: Path, *, dtype: torch.dtype | None) -> dict[str, Any]:
    """Load the parts that a model's longvideo.json takes from another folder, which diffusers does not read.

    dtype: data type of the autoencoder, which decides that of decoding.
    """
    if not (path / SETTINGS_FILE).is_file():
        return {}
    folder = ModelFolder.open(path)
    places = {name: str(part.folder) for name, part in folder.stored.items() if part.folder not in (None, path / name)}
    modules: dict[str, Any] = {}
    if VAE in places:
        modules[VAE] = AutoencoderKLWan.from_pretrained(places[VAE], torch_dtype=dtype)
    if TEXT_ENCODER in places:
        from transformers import AutoTokenizer, UMT5EncoderModel

        modules[TEXT_ENCODER] = UMT5EncoderModel.from_pretrained(places[TEXT_ENCODER])
        modules["tokenizer"] = AutoTokenizer.from_pretrained(str(Path(places[TEXT_ENCODER]).parent / "tokenizer"))
    return modules
