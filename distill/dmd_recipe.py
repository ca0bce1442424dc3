"""Distill a causal model into one of few steps by distribution matching: the recipe that the trainer runs."""

from __future__ import annotations

import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from longvideo.checkpoint.adapters import Adapter
from longvideo.distill.backbone import compile_blocks, load_backbone, set_adapter, stored_adapter
from longvideo.distill.compatibility import check_adapter
from longvideo.distill.distillation import DistillRecipe
from longvideo.distill.engine import PairedEngine
from longvideo.distill.memory import adapter_parameters, backbone_bytes, estimate_memory
from longvideo.distill.merging import save_merged
from longvideo.distill.objectives import CriticObjective, NoisyCopies, RoleObjective, StudentObjective
from longvideo.distill.prompts import DistillStage, RolloutSource
from longvideo.distill.roles import LoraRoles, Role
from longvideo.distill.self_forcing import SelfForcing
from longvideo.distributed import divide_batch
from longvideo.flow.unipc import UniPC
from longvideo.machine.launcher import launched
from longvideo.rollout import context_level
from longvideo.training.memory import BlockMemory, MemoryEstimate, engine_memory
from longvideo.training.optimizer import OptimizerConfig, RateSegment, rate_schedule
from longvideo.training.run import new_engine
from longvideo.training.run_folder import LORA, MODEL, describe_model

if TYPE_CHECKING:
    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.checkpoint.settings import ModelSettings
    from longvideo.model.transformer import CausalTransformer
    from longvideo.training.engine import Engine


class DmdRecipe(DistillRecipe[StudentObjective, RolloutSource]):
    """Trains a student and a critic on one frozen backbone: `method: dmd` of `longvideo distill`."""

    def check(self) -> None:
        config = self.config
        self.first_adapter = None if config.adapter is None else Adapter.load(Path(config.adapter))
        if self.first_adapter is not None:
            check_adapter(self.first_adapter, config.lora, self.shape, config.model or "", config.adapter or "")

    def build(self) -> None:
        config = self.config
        student = self._backbone(self.folder)
        teacher = None if config.teacher is None else self._backbone(self.teacher_folder)
        self.roles = LoraRoles(
            student, config.lora, teacher=teacher, new_cache=partial(self.new_cache, student), seed=config.seed
        )
        if self.first_adapter is not None:
            set_adapter(self.roles.trained(Role.STUDENT), self.first_adapter, scaling=config.lora.scaling)
        if config.compile and self.device.type == "cuda":
            compile_blocks(student, teacher)
        teacher_settings = self.settings if self.teacher_folder is None else self.teacher_folder.settings
        self.objective, self.critic = self._objectives(teacher_settings)
        self.source = self.clips

    @property
    def student(self) -> CausalTransformer:
        return self.roles.switch(Role.STUDENT)

    def engine(self) -> PairedEngine:
        """Return the engines of student and critic as one."""
        config, mesh = self.config, self.mesh
        passes = self.source.passes(mesh, config.parallel.micro_batch) if launched() else 1

        def new(objective: RoleObjective, optimizer: OptimizerConfig, ema_decay: float) -> Engine:
            self.roles.switch(objective.role)  # only the weights of the active role can have gradients
            # adapters are fp32 and compute in the dtype of their input, so nothing is cast
            trainer = replace(config.trainer, precision="fp32", ema_decay=ema_decay)
            return new_engine(
                objective, optimizer, trainer, config.parallel, mesh=mesh, device=self.device, passes=passes
            )

        return PairedEngine(
            (self.objective, new(self.objective, config.optimizer, config.trainer.ema_decay)),
            (self.critic, new(self.critic, config.critic_optimizer, 0.0)),
            critic_rate=rate_schedule(config.critic_optimizer, [RateSegment(s.steps) for s in config.stages]),
            student_every=config.student_every,
            critic_first=0 if self.dry_run else config.critic_first,
        )

    def export(self, folder: Path) -> None:
        """Write the student's adapter next to the model folder, and that folder too unless `merge` is false."""
        assert self.folder is not None, "a dry run exports nothing"
        adapter = stored_adapter(self.roles.trained(Role.STUDENT), self.config.lora)
        adapter.save(folder.parent / LORA, base=str(self.config.model))
        if self.config.exports_whole:
            save_merged(
                self.folder.with_adapters([adapter.stored()]),
                folder,
                steps=self.generation.steps,
                clean_pass=self.generation.clean_pass,
                overwrite=True,
            )

    def next_steps(self, folder: Path) -> list[str]:
        lora = folder / LORA
        if not self.config.exports_whole:
            words = ["longvideo", "merge", str(self.config.model), str(lora), str(folder / MODEL)]
            words += ["--steps", str(self.config.rollout.steps)]
            if not self.generation.clean_pass:
                words.append("--no-clean-pass")
            return [f"adapter: {lora}", f"next: {shlex.join(words)}"]
        assert self.folder is not None
        if {"vae", "text_encoder"} <= set(self.folder.parts):
            return [f"adapter: {lora}", *describe_model(folder)]
        return [f"adapter: {lora}", f"model: {folder / MODEL} (transformer only)"]

    def estimate(self, stage: DistillStage) -> MemoryEstimate:
        config, mesh, chunks = self.config, self.mesh, stage.frames // self.spec.chunk_frames
        clips, passes = divide_batch(stage.batch, mesh, config.parallel.micro_batch)
        count = adapter_parameters(self.shape, config.lora)
        student, critic = (
            engine_memory(
                count, config.parallel, ranks=mesh.world, bf16=False, passes=passes * chunks, averaged=averaged
            )
            for averaged in (config.trainer.ema_decay > 0, False)
        )
        frozen = backbone_bytes(self.shape, self.dtype.itemsize, packed=config.backbone.precision != "bf16")
        return estimate_memory(
            self.shape,
            self.spec,
            student + critic,
            BlockMemory(self.dtype.itemsize, checkpoint=config.dmd.checkpoint, compiled=config.compile),
            frozen=frozen if config.teacher is None else 2 * frozen,
            kv_cache=config.backbone.kv_cache,
            clips=clips,
            chunks=chunks,
        )

    @property
    def remedy(self) -> str:
        return "use backbone.precision=nvfp4, backbone.kv_cache=nvfp4, parallel.micro_batch=1 or dmd.checkpoint=true"

    @property
    def generation(self) -> ModelSettings:
        return self.config.rollout.distilled(self.settings)

    def _objectives(self, teacher: ModelSettings) -> tuple[StudentObjective, CriticObjective]:
        """Return the losses of student and critic, on common rollouts. teacher: settings of the teacher's model."""
        config, shift = self.config, self.settings.shift
        rollouts = SelfForcing(
            self.roles,
            config.rollout,
            spec=self.spec,
            shape=self.latent_shape,
            shift=shift,
            seed=config.seed,
            clean_pass=self.generation.clean_pass,
        )
        copies = NoisyCopies(
            rollouts,
            config.dmd,
            guidance=self.settings.guidance,
            shift=shift,
            seed=config.seed,
            context=context_level(UniPC(teacher.steps, teacher.shift), clean_pass=teacher.clean_pass),
        )
        return StudentObjective(rollouts, copies), CriticObjective(rollouts, copies)

    def _backbone(self, folder: ModelFolder | None) -> CausalTransformer:
        return load_backbone(
            folder,
            self.shape,
            formats=self.config.backbone.formats,
            dtype=self.dtype,
            device=self.device,
            seed=self.config.seed,
        )
