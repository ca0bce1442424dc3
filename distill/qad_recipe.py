"""Train a 4-bit student to match its bf16 teacher: the recipe of quantization-aware distillation."""

from __future__ import annotations

import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from longvideo.checkpoint.adapters import Adapter
from longvideo.distill.backbone import compile_blocks, set_adapter, stored_adapter
from longvideo.distill.compatibility import check_adapter, check_not_packed
from longvideo.distill.distillation import DistillRecipe
from longvideo.distill.memory import adapter_parameters, backbone_bytes, block_parameters, estimate_memory
from longvideo.distill.packing import save_student, with_trained
from longvideo.distill.qad import ChunkSource, QadObjective
from longvideo.distill.quantized_student import StudentAndTeacher, load_stored, train_adapter
from longvideo.distill.roles import Role
from longvideo.distill.self_forcing import RolloutConfig, SelfForcing
from longvideo.distributed import divide_batch
from longvideo.flow.schedule import FlowSchedule
from longvideo.machine.launcher import launched
from longvideo.model.cache import KVCache
from longvideo.quantization.products import choose_w4a4
from longvideo.quantization.straight_through import train_packed
from longvideo.training.memory import BlockMemory, MemoryEstimate, engine_memory
from longvideo.training.precision import resolve
from longvideo.training.run import new_engine
from longvideo.training.run_folder import LORA, MODEL, MODEL_BF16, describe_model
from longvideo.training.validation import validation_losses

if TYPE_CHECKING:
    from longvideo.checkpoint.settings import ModelSettings
    from longvideo.distill.prompts import DistillStage
    from longvideo.model.transformer import CausalTransformer
    from longvideo.training.engine import Engine


class QadRecipe(DistillRecipe[QadObjective, ChunkSource]):
    """Trains a student in NVFP4 against a frozen teacher: `method: qad` of `longvideo distill`."""

    def check(self) -> None:
        config = self.config
        self.first_adapter = None if config.adapter is None else Adapter.load(Path(config.adapter))
        if self.folder is not None:
            check_not_packed(self.teacher_folder or self.folder, "the teacher")
            if self.trains_weights:
                check_not_packed(self.folder, "with qad.train=weights, the student")
        if self.first_adapter is not None:
            check_adapter(self.first_adapter, config.lora, self.shape, config.model or "", config.adapter or "")

    def build(self) -> None:
        config = self.config
        new = partial(load_stored, shape=self.shape, dtype=self.dtype, device=self.device, seed=config.seed)
        teacher = new(self.teacher_folder or self.folder)
        student = new(self.folder)
        if self.trains_weights:
            trained = train_packed(student, choose_w4a4(self.device))
        else:
            packed = self.folder is not None and self.folder.is_packed
            trained = train_adapter(student, config.lora, packed=packed, seed=config.seed)
        if self.first_adapter is not None:
            set_adapter(trained, self.first_adapter, scaling=config.lora.scaling)
        if config.compile and self.device.type == "cuda":
            compile_blocks(student, teacher)
        caches = {Role.STUDENT: self.cache_type, Role.TEACHER: KVCache}
        self.networks = StudentAndTeacher(student, teacher, trained=trained, caches=caches, spec=self.spec)
        self.objective = self._objective()
        branches = self.objective.rollouts.branches
        self.source = ChunkSource(self.clips, branches)
        self.held_out = None
        if self.scripts.held_out is not None:
            last = replace(config.stages[-1], steps=config.qad.validation_batches)
            self.held_out = ChunkSource(self.clips_of(self.scripts.held_out, [last]), branches)

    @property
    def student(self) -> CausalTransformer:
        return self.networks.switch(Role.STUDENT)

    @property
    def trains_weights(self) -> bool:
        return self.config.qad.train == "weights"

    def engine(self) -> Engine:
        config, mesh = self.config, self.mesh
        return new_engine(
            self.objective,
            config.optimizer,
            replace(config.trainer, precision=self._engine_precision),
            config.parallel,
            mesh=mesh,
            device=self.device,
            passes=self.source.passes(mesh, config.parallel.micro_batch) if launched() else 1,
        )

    def validate(self) -> dict[str, float]:
        """Return losses on held-out videos, with the weights as they are now."""
        config = self.config
        self.networks.pack()
        if self.held_out is None:
            return {}
        return validation_losses(
            self.objective,
            self.held_out,
            batches=config.qad.validation_batches,
            mesh=self.mesh,
            micro_batch=config.parallel.micro_batch,
            precision="fp32",
        )

    def sample(self, step: int, folder: Path) -> dict[str, float]:
        self.networks.pack()
        return super().sample(step, folder)

    def export(self, folder: Path) -> None:
        """Write the model in 4 bits, an adapter next to it, and, if `merge` is set, the model in bf16."""
        assert self.folder is not None, "a dry run exports nothing"
        weights = self.networks.trained(Role.STUDENT)
        if self.trains_weights:
            packed = whole = with_trained(self.folder, weights)
        else:
            adapter = stored_adapter(weights, self.config.lora)
            adapter.save(folder.parent / LORA, base=str(folder))
            packed, whole = with_trained(self.folder, {}), self.folder.with_adapters([adapter.stored()])
        save = partial(save_student, settings=self.generation, record=self._record())
        save(packed, folder, precision="nvfp4")
        if self.config.exports_whole:
            save(whole, folder.parent / MODEL_BF16, precision="bf16")

    def next_steps(self, folder: Path) -> list[str]:
        model, cache = folder / MODEL, self.config.backbone.kv_cache
        assert self.folder is not None
        lines = [f"model in bf16: {folder / MODEL_BF16}"] if self.config.exports_whole else []
        if not {"vae", "text_encoder"} <= set(self.folder.parts):
            return [*lines, f"model: {model} (transformer only)"]
        *described, command = describe_model(folder)
        words = [] if self.trains_weights else ["--adapter", str(folder / LORA)]
        words += [] if cache == "bf16" else ["--kv-cache", cache]
        return [*lines, *described, f"{command} {shlex.join(words)}".rstrip()]

    def estimate(self, stage: DistillStage) -> MemoryEstimate:
        config, mesh, size = self.config, self.mesh, self.dtype.itemsize
        clips, passes = divide_batch(stage.batch, mesh, config.parallel.micro_batch)
        chunks = stage.frames // self.spec.chunk_frames
        branches = 1 if self.generation.guidance == 1 else 2
        engine = engine_memory(
            block_parameters(self.shape) if self.trains_weights else adapter_parameters(self.shape, config.lora),
            config.parallel,
            ranks=mesh.world,
            bf16=self._engine_precision == "bf16",
            passes=passes * chunks * branches,
            averaged=config.trainer.ema_decay > 0,
        )
        # the rounded weights of the student, which are there in addition to those that are trained
        frozen = sum(backbone_bytes(self.shape, size, packed=packed) for packed in (True, False))
        return estimate_memory(
            self.shape,
            self.spec,
            engine,
            BlockMemory(size, checkpoint=config.qad.checkpoint, compiled=config.compile),
            frozen=frozen,
            kv_cache=config.backbone.kv_cache,
            clips=clips,
            chunks=chunks,
        )

    @property
    def remedy(self) -> str:
        return "use qad.train=lora, backbone.kv_cache=nvfp4, parallel.micro_batch=1, qad.checkpoint=true, or more GPUs"

    @property
    def generation(self) -> ModelSettings:
        own, settings = self.config.qad, self.settings
        return replace(
            settings,
            steps=settings.steps if own.steps is None else own.steps,
            guidance=settings.guidance if own.guidance is None else own.guidance,
        )

    @property
    def _engine_precision(self) -> Literal["bf16", "fp32"]:
        """Number format in which the engine keeps weights; the networks compute in their own dtype, without autocast.

        DeepSpeed keeps bf16 weights, and their masters in float32. Adapters are always float32.
        """
        if launched() and self.trains_weights:
            return resolve(self.config.trainer.precision, self.device)
        return "fp32"

    def _objective(self) -> QadObjective:
        config, generation = self.config, self.generation
        rollouts = SelfForcing(
            self.networks,
            RolloutConfig(steps=generation.steps, exits="chunk"),
            spec=self.spec,
            shape=self.latent_shape,
            shift=generation.shift,
            seed=config.seed,
            clean_pass=generation.clean_pass,
            guidance=generation.guidance,
            finishes=True,
        )
        return QadObjective(self.networks, rollouts, config.qad, schedule=FlowSchedule(generation.shift))

    def _record(self) -> dict[str, Any]:
        """Return facts about the student for the folder of its model."""
        config, generation = self.config, self.generation
        return {
            "method": config.method,
            "model": config.model,
            "teacher": config.teacher or config.model,
            "trained": config.qad.train,
            "precision": config.backbone.precision,
            "kv_cache": config.backbone.kv_cache,
            "steps": generation.steps,
            "guidance": generation.guidance,
        }
