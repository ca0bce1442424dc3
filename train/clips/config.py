"""Configuration of training on encoded clips."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from longvideo.checkpoint.settings import ModelSettings
from longvideo.config.fields import Bounded, bounded, seed_field
from longvideo.distributed import ParallelConfig
from longvideo.errors import ConfigError
from longvideo.model.config import PRESETS
from longvideo.train.batch import ViewStage
from longvideo.train.clips.coreset import CoresetConfig
from longvideo.train.clips.views import ClipViewConfig
from longvideo.train.products import NVFP4_KEYS, ProductsConfig
from longvideo.train.recycling_config import ErrorRecyclingConfig
from longvideo.train.teacher_forcing import TeacherForcingConfig
from longvideo.training.objective import check_stages
from longvideo.training.optimizer import OptimizerConfig
from longvideo.training.trainer import TrainerConfig

if TYPE_CHECKING:
    from longvideo.train.step_rounding import Phases


@dataclass(frozen=True)
class ClipValidationConfig(Bounded):
    """What is measured and drawn for every sample.

    data: folder of encoded clips to compute the loss on, always with the same noise.
    batch: number of clips in a batch.
    batches: number of batches; 0 computes no loss.
    prompts: number of clips whose captions are made into videos, from the validation data if there is some.
    chunks: number of chunks of such a video.
    """

    data: str | None = None
    batch: int = bounded(8, least=1)
    batches: int = bounded(2, least=0)
    prompts: int = bounded(2, least=0)
    chunks: int = bounded(4, least=1)


@dataclass(frozen=True)
class ClipTraining(Bounded):
    """Configuration of `longvideo train clips`.

    seed: seed of weights, data and noise.
    data: folder that `longvideo data encode` made, or a manifest of videos, which are encoded again in every epoch.
        `--dry-run` needs neither: it uses noise of the shapes of `settings`.
    initialize: model folder to take everything else from, its settings too. Without one, a transformer of `preset`
        starts from random weights.
    preset: shape of a transformer that starts from random weights.
    settings: chunks, picture size and generation defaults of a model that starts from random weights; a value other
        than that of the model in `initialize` is refused.
    views: what is taken from a clip, and how much noise it gets.
    objective: how the loss is computed.
    products: number format of the products of the blocks.
    coreset: selection of the clips on which 4 bits matter most.
    recycle_errors: whether to add the model's own earlier errors to its inputs.
    recycling: how errors are kept and added.
    stages: runs of steps, one after another.
    optimizer: optimizer and its schedule.
    trainer: logs, samples and checkpoints.
    parallel: division over several processes.
    validation: loss on held-out clips, and videos that are generated for every sample.
    """

    renamed: ClassVar = NVFP4_KEYS

    seed: int = seed_field()
    data: str | None = None
    initialize: str | None = None
    preset: str = "wan2.2-ti2v-5b"
    settings: ModelSettings = field(default_factory=ModelSettings)
    views: ClipViewConfig = field(default_factory=ClipViewConfig)
    objective: TeacherForcingConfig = field(default_factory=lambda: TeacherForcingConfig(checkpoint=True))
    products: ProductsConfig = field(default_factory=ProductsConfig)
    coreset: CoresetConfig = field(default_factory=CoresetConfig)
    recycle_errors: bool = False
    recycling: ErrorRecyclingConfig = field(default_factory=ErrorRecyclingConfig)
    stages: list[ViewStage] = field(default_factory=lambda: [ViewStage(steps=600, batch=1, chunks=12)])
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-5, schedule="constant", beta2=0.999, gradient_clip=10)
    )
    trainer: TrainerConfig = field(
        default_factory=lambda: TrainerConfig(ema_decay=0.99, log_every=1, save_every=100, max_skipped_steps=10)
    )
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    validation: ClipValidationConfig = field(default_factory=ClipValidationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stages(self.stages)
        if self.coreset.share < 1 and self.products.format != "nvfp4":
            raise ConfigError(
                f"coreset.share is {self.coreset.share}, but products.format is {self.products.format}; clips are"
                " selected by what 4 bits change, so use products.format=nvfp4 or coreset.share=1"
            )
        self.phases()  # refuses an end of the products that does not exist
        if self.preset not in PRESETS:
            raise ConfigError(f"preset is {self.preset!r}; expected one of {', '.join(PRESETS)}")

    def phases(self) -> Phases:
        """Return the phase of the products in every step."""
        return self.products.phases(self.optimizer, sum(stage.steps for stage in self.stages))
