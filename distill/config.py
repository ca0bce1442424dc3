"""Configuration of a distillation."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal

from longvideo.checkpoint.settings import ModelSettings
from longvideo.config.fields import Bounded, bounded, seed_field, share
from longvideo.distill.objectives import DmdConfig
from longvideo.distill.prompts import SHAPEWORLD, DistillStage, ShapeWorldConfig
from longvideo.distill.qad import QadConfig
from longvideo.distill.roles import LoraSettings
from longvideo.distill.self_forcing import RolloutConfig
from longvideo.distributed import ParallelConfig
from longvideo.errors import ConfigError
from longvideo.flow.schedule import NUM_TRAIN_TIMESTEPS
from longvideo.model.cache import CachePrecision
from longvideo.model.config import PRESETS
from longvideo.quantization.number_formats import DifferentiablePrecision, NumberFormats
from longvideo.training.objective import check_stages
from longvideo.training.optimizer import OptimizerConfig
from longvideo.training.trainer import TrainerConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

OF_DMD = ("student_every", "critic_first", "rollout", "dmd", "critic_optimizer")
"""Keys that only the method dmd uses."""
OF_ADAPTERS = ("lora", "adapter")


@dataclass(frozen=True)
class BackboneConfig:
    """How the frozen weights are stored.

    precision: number format of the weights, as of `generate`, but not fp8.
    kv_cache: number format of the cached keys and values of finished chunks.
    """

    precision: DifferentiablePrecision = "nvfp4"
    kv_cache: CachePrecision = "bf16"

    @property
    def formats(self) -> NumberFormats:
        """Return the number formats of the backbone."""
        return NumberFormats(self.precision, self.kv_cache)


@dataclass(frozen=True)
class SampleConfig(Bounded):
    """Videos that are generated for every sample.

    prompts: number of videos; 0 generates nothing.
    chunks: number of chunks of a video.
    steps: numbers of solver steps; the videos are generated once with each.
    judge: whether the judge scores videos of ShapeWorld's prompts: the share that matches the prompt.
    """

    prompts: int = bounded(4, least=0)
    chunks: int = bounded(4, least=1)
    steps: list[int] = bounded([4, 2], least=1, most=NUM_TRAIN_TIMESTEPS)
    judge: bool = True


@dataclass(frozen=True)
class Distillation(Bounded):
    """Configuration of `longvideo distill`.

    method: what the student learns: to need few steps (`dmd`), or to compute in 4 bits (`qad`).
    seed: seed of adapters, prompts and noise.
    model: folder of the causal model; it gives the student, and the teacher too unless `teacher` is set. `--dry-run`
        needs none: it uses random weights and noise instead of prompts.
    preset: shape of a dry run without a model.
    settings: chunks and picture size of a dry run without a model; a value other than that of `model` is refused.
    teacher: folder of another model to learn from.
    adapter: LoRA folder that the student starts from.
    prompts: `shapeworld`, or a file with a prompt in each line (`.jsonl`: a list of shots in each line).
    data: folder of encoded clips to take captions, cuts and first frames from instead of prompts.
    image_fraction: share of the steps whose videos begin with a given frame, of `data`.
    negative_prompt: prompt that the teacher's guidance moves away from, in all videos. Another one in a line of
        `prompts` is refused; its `seconds` and `seed`, which `generate --prompts` reads, are not used.
    student_every: of dmd, number of steps of the critic for each step of the student.
    critic_first: of dmd, number of steps at the start that train the critic alone, for a student that starts from
        `adapter`.
    compile: whether to compile the blocks, without their attention; only on CUDA.
    merge: whether to export whole weights too: of dmd those with the adapter added, by default; of qad those in bf16.
    backbone: number formats of the frozen weights.
    lora: size of the adapters.
    rollout: how the student of dmd generates.
    dmd: the distribution matching loss.
    qad: quantization-aware distillation.
    shapeworld: prompts of ShapeWorld.
    stages: runs of steps, one after another.
    optimizer: optimizer of the student.
    critic_optimizer: optimizer of the critic of dmd.
    trainer: logs, samples and checkpoints.
    parallel: division over several processes.
    samples: videos that are generated for every sample.
    """

    method: Literal["dmd", "qad"] = "dmd"
    seed: int = seed_field()
    model: str | None = None
    preset: str = "wan2.2-ti2v-5b"
    settings: ModelSettings = field(default_factory=ModelSettings)
    teacher: str | None = None
    adapter: str | None = None
    prompts: str = SHAPEWORLD
    data: str | None = None
    image_fraction: float = share(0.0)
    negative_prompt: str = ""
    student_every: int = bounded(5, least=1)
    critic_first: int = bounded(0, least=0)
    compile: bool = False
    merge: bool | None = None
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    dmd: DmdConfig = field(default_factory=DmdConfig)
    qad: QadConfig = field(default_factory=QadConfig)
    shapeworld: ShapeWorldConfig = field(default_factory=ShapeWorldConfig)
    stages: list[DistillStage] = field(default_factory=lambda: [DistillStage()])
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=1e-5, schedule="constant", beta1=0.0, beta2=0.999, gradient_clip=10.0
        )
    )
    critic_optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=2e-6, schedule="constant", beta1=0.0, beta2=0.999, gradient_clip=10.0
        )
    )
    trainer: TrainerConfig = field(
        default_factory=lambda: TrainerConfig(ema_decay=0.99, log_every=1, save_every=50, max_skipped_steps=10)
    )
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    samples: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in PRESETS:
            raise ConfigError(f"preset is {self.preset!r}; expected one of {', '.join(PRESETS)}")
        check_stages(self.stages)
        total = sum(stage.steps for stage in self.stages)
        first = -(-self.critic_first // self.student_every) * self.student_every
        if first >= total > 0:
            raise ConfigError(
                f"critic_first is {self.critic_first}; with student_every={self.student_every} the student would first"
                f" train after {first} steps, but the stages have {total}; use smaller numbers, or more steps"
            )
        if self.image_fraction and self.data is None:
            raise ConfigError("image_fraction needs first frames; set data=CLIPS, a folder of encoded clips")
        if self.parallel.sequence > 1:
            raise ConfigError(
                f"parallel.sequence is {self.parallel.sequence}; expected 1, as ranks share no video here"
            )
        if self.parallel.zero_stage > 2:
            raise ConfigError(
                "parallel.zero_stage is 3; expected 0, 1 or 2, because roll-outs need whole weights on every GPU"
            )
        self._check_method()

    def _check_method(self) -> None:
        """Raise ConfigError for a key that has another value than its default and that the method does not use."""
        if self.method == "dmd":
            self._refuse(("qad",), "method=dmd", "set method=qad")
            return
        self._refuse(OF_DMD, "method=qad", "leave it out, or start from a preset such as tiny/qad")
        if self.qad.train == "weights":
            self._refuse(OF_ADAPTERS, "qad.train=weights", "set qad.train=lora")
        if self.backbone.precision != "nvfp4":
            raise ConfigError(
                f"backbone.precision is {self.backbone.precision!r}; expected 'nvfp4', the number format that"
                " method=qad trains for"
            )

    def _refuse(self, names: tuple[str, ...], choice: str, remedy: str) -> None:
        for own in fields(self):
            if own.name in names:
                for key in _set_keys(own.name, getattr(self, own.name), _default(own)):
                    raise ConfigError(f"{key} is set, and {choice} does not use it; {remedy}")

    @property
    def exports_whole(self) -> bool:
        """Whether whole weights are exported in addition to what the method exports."""
        return self.method == "dmd" if self.merge is None else self.merge

    @property
    def validates(self) -> bool:
        """Whether a loss on held-out videos is computed."""
        return self.method == "qad" and self.qad.validation_batches > 0


def _set_keys(key: str, value: Any, default: Any) -> Iterator[str]:
    """Yield the keys, at `key` or below it, whose values are not their defaults."""
    if is_dataclass(value):
        for own in fields(value):
            yield from _set_keys(f"{key}.{own.name}", getattr(value, own.name), getattr(default, own.name))
    elif value != default:
        yield key


def _default(of: Field[Any]) -> Any:
    return of.default if of.default_factory is MISSING else of.default_factory()
