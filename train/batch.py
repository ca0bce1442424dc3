"""Input of one rank in a teacher-forcing step: latents, noise, noise levels and captions.

Shapes: B views, C channels, T latent frames of a view, H W latent grid, Q chunks of a view, S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from longvideo.config.fields import Bounded, bounded, steps_field
from longvideo.distributed import Mesh, divide_batch
from longvideo.errors import ConfigError


@dataclass(frozen=True)
class ViewStage(Bounded):
    """A run of steps on views of one length. Views of one chunk show how a video begins, from the prompt alone.

    steps: number of steps.
    batch: number of views in a step, over all ranks.
    chunks: number of chunks of a view.
    learning_rate: peak that replaces the optimizer's; 0 freezes the weights.
    """

    steps: int = steps_field(10000)
    batch: int = bounded(64, least=1)
    chunks: int = bounded(3, least=1)
    learning_rate: float | None = bounded(None, least=0)


@dataclass(frozen=True)
class Origin:
    """Where the views of a batch come from, which decides where their prediction errors are stored.

    step: number of the step. samples: numbers of the views in the batch of the step. chunks: numbers of the chunks in
    the view. sigma_BQ: noise level of every chunk, on the host. trained_BQ: whether a chunk has a loss, on the host.
    given_BT: 1 at given frames, on the device.
    """

    step: int
    samples: tuple[int, ...]
    chunks: tuple[int, ...]
    sigma_BQ: Tensor
    trained_BQ: Tensor
    given_BT: Tensor


@dataclass(frozen=True)
class ViewBatch:
    """A rank's share of one pass.

    clean, noise, context_noise: [B, C, T, H, W]. sigma: noise level of the noisy copy, which the model is given, [B,
    T]. context_sigma: noise level of the clean copy, which the model is given as 0, [B, T]. loss_mask: weight of a
    frame in the loss, [B, T]. ids, mask: tokens, [B, Q, S]; None if there are features. features: [B, Q, J, D]; None if
    there are tokens. mean_weight: sum of the loss mask over all shares of a step, divided by their number, so that the
    mean of all shares' losses is the mean over all frames that count, however they are divided. cuts: whether each
    chunk of the whole view opens a shot, if that changes positions or what is seen. origin: see `Origin`. first_view:
    number of the first view in the batch of the step.
    """

    clean: Tensor
    noise: Tensor
    context_noise: Tensor
    sigma: Tensor
    context_sigma: Tensor
    loss_mask: Tensor
    ids: Tensor | None
    mask: Tensor | None
    features: Tensor | None
    mean_weight: Tensor
    cuts: tuple[bool, ...] | None = None
    origin: Origin | None = None
    first_view: int = 0

    def shares(self, mesh: Mesh, micro_batch: int | None, chunk_frames: int) -> list[ViewBatch]:
        """Divide the batch of a whole step; return this rank's shares, one for each pass.

        Raises ConfigError if views or chunks do not divide.
        """
        views, frames = self.sigma.shape
        size, passes = divide_batch(views, mesh, micro_batch)
        if frames % (mesh.sequence * chunk_frames):
            raise ConfigError(
                f"{frames // chunk_frames} chunks do not divide into {mesh.sequence} ranks; use a multiple"
            )
        own = frames // mesh.sequence
        time = slice(mesh.place * own, (mesh.place + 1) * own)
        chunks = slice(time.start // chunk_frames, time.stop // chunk_frames)
        mean_weight = self.loss_mask.sum() / (mesh.world * passes)

        def share(number: int) -> ViewBatch:
            first = (mesh.replica * passes + number) * size
            view = slice(first, first + size)

            def texts(x: Tensor | None) -> Tensor | None:
                return None if x is None else x[view, chunks]

            return ViewBatch(
                *(x[view, :, time] for x in (self.clean, self.noise, self.context_noise)),
                *(x[view, time] for x in (self.sigma, self.context_sigma, self.loss_mask)),
                ids=texts(self.ids),
                mask=texts(self.mask),
                features=texts(self.features),
                mean_weight=mean_weight,
                cuts=self.cuts,
                first_view=first,
            )

        return [share(number) for number in range(passes)]
