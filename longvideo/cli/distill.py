"""`longvideo distill`: distill a causal model into one of few steps, or into one that computes in 4 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from longvideo.cli.training import train, training_command
from longvideo.machine.packages import require

if TYPE_CHECKING:
    import torch

    from longvideo.distill.config import Distillation
    from longvideo.distill.distillation import DistillRecipe
    from longvideo.distributed import Mesh
    from longvideo.training.engine import Engine
    from longvideo.training.options import RunOptions


def run(options: RunOptions) -> None:
    """Distill a causal model on its own videos, which it makes as in generation: chunk by chunk on its own chunks.

    `method: dmd` makes a student of 4 or 2 steps without guidance (distribution matching), training LoRA weights alone.
    Student and critic are adapters on one frozen backbone, packed to 4 bits unless `backbone.precision=bf16`; without
    an adapter the backbone is the teacher.

    `method: qad` trains a model to compute in 4 bits (quantization-aware distillation): the student, with weights and
    inputs in NVFP4, learns the velocities of its own teacher in bf16. All weights of the blocks are trained, or LoRA
    on packed weights with `qad.train=lora`.

    Prompts are ShapeWorld's, or `prompts=FILE` (one a line; `.jsonl` with a list of shots a line), or the captions of
    `data=CLIPS`, a folder that `longvideo data encode` made, whose first frames can be given too.

    The run folder has the files of `longvideo train ar`. In addition, `lora/` holds the student's adapter with the
    names of peft and of diffusers; `model/` holds whole weights, which `qad` packs to 4 bits.

    On a GPU: `longvideo distill tiny/dmd --output runs/dmd`

    On a CPU, in a minute or two: `longvideo distill cpu/dmd --output runs/try_dmd`

    `torchrun --nproc-per-node 8 -m longvideo distill wan/dmd model=CAUSAL_5B prompts=prompts.txt --output runs/dmd`

    `torchrun --nproc-per-node 8 -m longvideo distill wan/qad model=runs/dmd/model prompts=prompts.txt -o runs/qad`

    Presets: `tiny/dmd` (the default), `wan/dmd`, `cpu/dmd`, `tiny/qad`, `wan/qad`, `cpu/qad`.

    Keys most used: `model`, `prompts`, `stages[0].frames`, `stages[0].steps`, `rollout.steps`,
    `optimizer.learning_rate`, `critic_optimizer.learning_rate`, `lora.rank`, `backbone.precision`, `qad.train`.
    `longvideo config keys distill` explains all.
    """
    require("peft", extra="train", purpose="longvideo distill")
    from longvideo.distill.config import Distillation

    def build(config: Distillation, device: torch.device, mesh: Mesh) -> DistillRecipe[Any, Any]:
        from longvideo.distill.dmd_recipe import DmdRecipe
        from longvideo.distill.qad_recipe import QadRecipe

        recipe = {"dmd": DmdRecipe, "qad": QadRecipe}[config.method]
        return recipe(config, device, mesh, dry_run=options.dry_run > 0)

    def build_engine(
        _config: Distillation, recipe: DistillRecipe[Any, Any], _mesh: Mesh, _device: torch.device
    ) -> Engine:
        return recipe.engine()

    train(options, Distillation, build, default_config="tiny/dmd", build_engine=build_engine)


distill = training_command(run, command="distill", folder="runs/distill")
