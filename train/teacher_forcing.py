"""Teacher forcing: predict the velocity of every chunk of a noisy copy, given clean earlier chunks, in one pass.

Shapes: B views, C channels, T latent frames, H W latent grid, Q chunks, S tokens of a prompt, J text positions. Where
ranks share the frames of a view (`longvideo.train.sequence_parallel`), T and Q are a rank's own.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from longvideo.distributed import Mesh, ParallelConfig
from longvideo.kernels.backends import attention_backend
from longvideo.machine.launcher import launched
from longvideo.model.attention import AttentionPattern, Blockwise, Masked, StaticPattern
from longvideo.model.cache import visible_chunks
from longvideo.model.layout import TokenLayout
from longvideo.model.rope import Rope
from longvideo.model.transformer import CausalTransformer, TextContext
from longvideo.rollout import CLEAN_CONTEXT, ContextLevel
from longvideo.train.error_recycling import ErrorBank, Injected
from longvideo.train.prediction_errors import prediction_errors
from longvideo.train.sequence_parallel import UlyssesAttention
from longvideo.train.weight_states import layer_watch
from longvideo.training.objective import Objective, by_noise_level, compile_fact, ratio

if TYPE_CHECKING:
    from collections.abc import Callable

    from longvideo.flow.schedule import FlowSchedule
    from longvideo.model.spec import ChunkSpec
    from longvideo.train.batch import ViewBatch
    from longvideo.train.step_rounding import StepRounding

KEPT_PLANS = 32
"""Number of plans that are kept: masks and rotations, one for each pattern of cuts."""
ATTENTION = {"blockwise": Blockwise, "masked": Masked}


@dataclass(frozen=True)
class TeacherForcingConfig:
    """How the loss is computed.

    compile: whether to compile the loss, or, where processes share videos, each block; only on CUDA.
    compile_mode: mode of `torch.compile`.
    attention: `blockwise` multiplies visible runs of tokens one by one, `masked` all at once through a FlexAttention
        block mask (a dense mask on a CPU).
    context: earlier chunks that a chunk sees: `all`, or the `window` of streaming, with its sink and pins.
    checkpoint: whether to recompute blocks in the backward pass instead of keeping their activations.
    """

    compile: bool = True
    compile_mode: str = "default"
    attention: Literal["blockwise", "masked"] = "blockwise"
    context: Literal["all", "window"] = "all"
    checkpoint: bool = False


def runnable(config: TeacherForcingConfig, parallel: ParallelConfig, *, ranks: int = 1) -> TeacherForcingConfig:
    """Return the configuration, without compilation if ZeRO shards the weights; that is logged.

    DeepSpeed gathers a layer's weights when the layer is called, which compiled code does not do.
    """
    if not (config.compile and (launched() or ranks > 1) and parallel.zero_stage == 3):
        return config
    logging.getLogger(__name__).warning("objective.compile is off because parallel.zero_stage=3 shards the weights")
    return replace(config, compile=False)


@dataclass(frozen=True)
class ViewPlan:
    """Positions and attention of a pass; they depend only on the number of chunks of a view and on its cuts.

    seen_frames: number of own latent frames that have a clean copy.
    """

    rope: Rope
    attention: AttentionPattern
    seen_frames: int


class TeacherForcing(Objective):
    """Trains a transformer, and its text encoder if there is one, on views of any number of chunks.

    text_encoder: tokens to features; None if batches contain features. bank: recycles errors of batches with an
    `Origin` while gradients are enabled. rounding: rounding of a transformer in low precision. context: noise
    level at which generation caches finished chunks, and so at which the clean copy is shown.
    """

    def __init__(
        self,
        transformer: CausalTransformer,
        text_encoder: nn.Module | None,
        config: TeacherForcingConfig,
        *,
        spec: ChunkSpec,
        schedule: FlowSchedule,
        device: torch.device,
        mesh: Mesh | None = None,
        bank: ErrorBank | None = None,
        rounding: StepRounding | None = None,
        context: ContextLevel = CLEAN_CONTEXT,
    ) -> None:
        super().__init__()
        self.rounding = rounding
        self.weight_states = None if rounding is None else rounding.history
        self.layer_watch = None if rounding is None else layer_watch(rounding.layers)
        self.context = context
        self.bank = bank
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.config = config
        self.spec = spec
        self.schedule = schedule
        self.device = device
        self.mesh = mesh or Mesh()
        self._plans: dict[tuple[int, tuple[bool, ...] | None], ViewPlan] = {}
        self._run: Callable[..., tuple[Tensor, dict[str, Tensor], Tensor]] = self._loss
        if config.compile and device.type == "cuda":
            if self.mesh.sequence > 1 or config.checkpoint:
                for block in transformer.blocks:
                    block.compile(dynamic=False, mode=config.compile_mode)
            else:
                self._run = torch.compile(self._loss, dynamic=False, mode=config.compile_mode)

    def facts(self) -> list[str]:
        """Return the parts of the start line about attention, products and compilation."""
        config = self.config
        products = "not quantized" if self.rounding is None else self.rounding.description
        return [
            f"attention: {config.attention} ({attention_backend('bf16', self.device)}), context {config.context}",
            f"products of the blocks: {products}",
            compile_fact(config.compile, self.device),
        ]

    def begin(self, step: int) -> None:
        if self.rounding is not None:
            self.rounding.begin(step)

    def forward(self, batch: ViewBatch) -> tuple[Tensor, dict[str, Tensor]]:
        if self.rounding is not None:
            self.rounding.next_pass(batch.first_view)
        # the loss of a validation depends on the weights alone
        bank = self.bank if torch.is_grad_enabled() else None
        clean, origin = batch.clean, batch.origin
        injected = Injected(clean, clean, batch.noise, torch.empty(0))
        if bank is not None and origin is not None:
            injected = bank.inject(
                clean,
                batch.noise,
                origin.sigma_BQ,
                step=origin.step,
                samples=origin.samples,
                chunks=origin.chunks,
                given_BT=origin.given_BT,
            )
        # validation is too short to be worth a compilation
        run = self._run if torch.is_grad_enabled() else self._loss
        loss, metrics, velocity = self._run_on(run, batch, injected)
        if bank is not None and origin is not None:
            noisy = self.schedule.add_noise(injected.latents, injected.noise, batch.sigma)
            target = self.schedule.velocity(clean, injected.noise)
            errors = prediction_errors(velocity.detach(), target, noisy, clean, batch.sigma)
            bank.add(
                *errors,
                origin.sigma_BQ,
                used_clean=injected.used_clean,
                step=origin.step,
                samples=origin.samples,
                chunks=origin.chunks,
                trained_BQ=origin.trained_BQ,
            )
        return loss, metrics

    def predict(self, batch: ViewBatch) -> tuple[Tensor, Tensor]:
        """Return the velocity of the noisy copy and its target, without recycled errors and compilation."""
        injected = Injected(batch.clean, batch.clean, batch.noise, torch.empty(0))
        return self._run_on(self._loss, batch, injected)[2], self.schedule.velocity(batch.clean, batch.noise)

    def _run_on(
        self, run: Callable[..., tuple[Tensor, dict[str, Tensor], Tensor]], batch: ViewBatch, injected: Injected
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        return run(
            batch.clean,
            injected.context,
            injected.latents,
            injected.noise,
            batch.context_noise,
            batch.sigma,
            batch.context_sigma,
            batch.loss_mask,
            batch.ids,
            batch.mask,
            batch.features,
            batch.mean_weight,
            plan=self.plan(batch.clean.shape[2] // self.spec.chunk_frames, batch.cuts),
        )

    def plan(self, chunks: int, cuts: tuple[bool, ...] | None) -> ViewPlan:
        """Return the plan of a view with this number of own chunks.

        cuts: whether each chunk of the whole view opens a shot; None if cuts do not matter.
        """
        key = (chunks, cuts)
        if key not in self._plans:
            if len(self._plans) == KEPT_PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = self._new_plan(chunks * self.mesh.sequence, cuts)
        return self._plans[key]

    def _new_plan(self, chunks: int, cuts: tuple[bool, ...] | None) -> ViewPlan:
        spec, mesh = self.spec, self.mesh
        visible = None
        if self.config.context == "window":
            visible = visible_chunks(spec, list(cuts or (False,) * chunks))
        offsets = cuts if spec.offset_per_shot else None
        if mesh.sequence == 1:
            layout = own = TokenLayout.training(spec, chunks, offsets)
            seen = (chunks - 1) * spec.chunk_frames
        else:
            layout = TokenLayout.balanced(spec, chunks, ranks=mesh.sequence, cuts=offsets)
            own = layout.part(mesh.place, mesh.sequence)
            seen = chunks // mesh.sequence * spec.chunk_frames
        if self.config.attention == "masked":
            layout = layout.to(self.device)
        attention: StaticPattern = ATTENTION[self.config.attention](layout, visible)
        rope = self.transformer.rope(own.to(self.device))
        if mesh.sequence_group is None:
            return ViewPlan(rope, attention, seen)
        return ViewPlan(rope, UlyssesAttention(attention, mesh.sequence_group), seen)

    def _loss(
        self,
        clean: Tensor,
        context_clean: Tensor,
        latents: Tensor,
        noise: Tensor,
        context_noise: Tensor,
        sigma: Tensor,
        context_sigma: Tensor,
        loss_mask: Tensor,
        ids: Tensor | None,
        mask: Tensor | None,
        features: Tensor | None,
        mean_weight: Tensor,
        plan: ViewPlan,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        # only given frames have no noise, and they stay clean in every pass
        is_generated = (sigma > 0).to(sigma)
        level = torch.maximum(context_sigma, self.context.sigma * is_generated)
        context = self.schedule.add_noise(context_clean, context_noise, level)
        features = self._features(ids, mask) if features is None else features
        noisy = self.schedule.add_noise(latents, noise, sigma)
        velocity = self.velocity(context, noisy, self.context.model_sigma * is_generated, sigma, features, plan)
        error_BT = (velocity - self.schedule.velocity(clean, noise)).square().mean((1, 3, 4))
        loss = (self.schedule.loss_weight(sigma) * error_BT * loss_mask).sum() / mean_weight
        return loss, _metrics(error_BT, sigma, loss_mask), velocity

    def _features(self, ids_BQS: Tensor | None, mask_BQS: Tensor | None) -> Tensor:
        assert self.text_encoder is not None and ids_BQS is not None and mask_BQS is not None
        features = self.text_encoder(ids_BQS.flatten(0, 1), mask_BQS.flatten(0, 1))
        return features.unflatten(0, ids_BQS.shape[:2])

    def velocity(
        self,
        context: Tensor,
        noisy: Tensor,
        context_sigma_BT: Tensor,
        sigma_BT: Tensor,
        features_BQJD: Tensor,
        plan: ViewPlan,
    ) -> Tensor:
        """Return the velocity of the noisy copy, [B, C, T, H, W]. The levels are those that the model is given."""
        seen = plan.seen_frames
        text = self.transformer.encode_text(features_BQJD.flatten(0, 1))
        velocity = self.transformer(
            torch.cat((context[:, :, :seen], noisy), dim=2),
            torch.cat((context_sigma_BT[:, :seen], sigma_BT), dim=1),
            _of_runs(text, features_BQJD.shape[1], seen // self.spec.chunk_frames),
            rope=plan.rope,
            attention=plan.attention,
            checkpoint=self.config.checkpoint and torch.is_grad_enabled(),
        )
        return velocity[:, :, seen:]


def _of_runs(text: TextContext, chunks: int, seen: int) -> TextContext:
    """Give every run of tokens its chunk's prompt: first the runs of clean copies, then those of noisy ones.

    It uses slices, because the gradient of an index is a scatter with atomics.
    """

    def runs(x: Tensor) -> Tensor:
        x = x.unflatten(0, (-1, chunks))
        return torch.cat((x[:, :seen], x), dim=1).flatten(0, 1)

    return TextContext(tuple(map(runs, text.keys)), tuple(map(runs, text.values)))


def _metrics(error_BT: Tensor, sigma_BT: Tensor, mask_BT: Tensor) -> dict[str, Tensor]:
    """Return the unweighted error, overall and by quarters of the noise level."""
    error = error_BT.detach() * mask_BT
    return {"mse": ratio(error.sum(), mask_BT.sum()), **by_noise_level("mse", error, sigma_BT, mask_BT)}
