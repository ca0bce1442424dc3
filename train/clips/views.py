"""Batches from a folder of encoded clips: every rank reads the latent frames that it trains on, and no others.

Shapes: B views, C channels, T latent frames of a rank, H W latent grid, Q chunks of a rank, J text positions, D width.
"""

from __future__ import annotations

import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from longvideo.config.fields import Bounded, bounded, share
from longvideo.distributed import Mesh, common_passes, divide_batch
from longvideo.errors import ConfigError, UserError
from longvideo.model.conditioning import video_texts
from longvideo.train.batch import Origin, ViewBatch, ViewStage
from longvideo.training.objective import seeded, stage_at

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from longvideo.flow.schedule import FlowSchedule
    from longvideo.train.clips.coreset import Coreset


@dataclass(frozen=True)
class ClipViewConfig(Bounded):
    """What is taken from a clip, and how much noise it gets.

    start_fraction: share of views that begin where their clip begins; views of one chunk always do. The first chunk of
        other views is context alone.
    prompt_dropout: share of views with an empty prompt, for guidance.
    context_noise_fraction: share of context chunks that get noise.
    context_noise_max: largest noise level of the context; the model is not given the level.
    image_fraction: share of the views that begin a clip whose first latent frame is given, for image to video.
    max_bad: number of unreadable clips to skip before the run stops. The next clip replaces a skipped one. Above 0, the
        ranks exchange in every step which clips could not be read.
    """

    start_fraction: float = share(1.0)
    prompt_dropout: float = share(0.1)
    context_noise_fraction: float = share(0.0)
    context_noise_max: float = share(0.1)
    image_fraction: float = share(0.0)
    max_bad: int = bounded(0, least=0)


class ClipInfo(Protocol):
    """Description of each chunk of a clip, which is available without reading the clip."""

    @property
    def captions(self) -> Sequence[str]: ...

    @property
    def cuts(self) -> Sequence[bool]: ...


class Clips(Protocol):
    """Encoded clips, such as a `longvideo.data.encoded.EncodedDataset`."""

    @property
    def clips(self) -> Sequence[ClipInfo]: ...

    @property
    def num_chunks(self) -> int: ...

    @property
    def chunk_frames(self) -> int: ...

    def latents(self, index: int, first: int, last: int) -> Tensor:
        """Return latent frames [first, last), float32 [C, t, H, W]. Raises UserError for a clip that cannot be read."""
        ...

    def text(self, caption: str) -> Tensor:
        """Return features [J, D] of a caption, which may follow the words that announce a cut, or may be empty."""
        ...


_Read = tuple[Tensor, Tensor] | UserError
"""Latents and features of a rank's frames of a view, or the reason why they cannot be read."""


@dataclass(frozen=True)
class _Draw:
    """Choices for the whole batch of a step, equal on all ranks, on the host.

    clip, first_chunk, dropped: [B]. sigma, context_sigma, loss_mask: [B, T].
    """

    clip: list[int]
    first_chunk: list[int]
    dropped: list[bool]
    sigma: Tensor
    context_sigma: Tensor
    loss_mask: Tensor


class ClipViewSource:
    """Views as a function of seed and step. An epoch shows every clip once, in a new order.

    cuts_matter: whether cuts change positions or what is seen; views then cannot share a pass. cut_prefix: text that
    the text encoder reads before the caption of a chunk that opens a shot after another one. coreset: clips to draw
    from; by default all of them.
    """

    unit = "tok"

    def __init__(
        self,
        clips: Clips,
        stages: Sequence[ViewStage],
        config: ClipViewConfig,
        schedule: FlowSchedule,
        *,
        seed: int,
        tokens_per_chunk: int,
        cuts_matter: bool,
        cut_prefix: str,
        device: torch.device,
        coreset: Coreset | None = None,
    ) -> None:
        self.coreset = coreset
        if not clips.clips:
            raise ConfigError("the data set has no clips; encode at least one")
        for stage in stages:
            if stage.chunks > clips.num_chunks:
                raise ConfigError(
                    f"a stage has chunks={stage.chunks}; expected at most {clips.num_chunks}, the length of the clips"
                )
        self.clips = clips
        self.stages = list(stages)
        self.config = config
        self.sigmas = schedule.sigmas.float()
        self.seed = seed
        self.tokens_per_chunk = tokens_per_chunk
        self.cuts_matter = cuts_matter
        self.cut_prefix = cut_prefix
        self.device = device
        self._generator = torch.Generator()
        self._noise_generator = torch.Generator(device)
        self._orders: dict[int, list[int]] = {}
        self.unreadable: set[int] = set()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="clips")
        self._ahead: tuple[int, Future[list[_Read]]] | None = None

    def check(self, mesh: Mesh, micro_batch: int | None) -> None:
        """Raise ConfigError if a batch does not divide, or if views whose cuts matter would share a pass."""
        sizes = [divide_batch(stage.batch, mesh, micro_batch)[0] for stage in self.stages if stage.steps]
        if self.cuts_matter and any(size > 1 for size in sizes):
            raise ConfigError(
                "with settings.offset_per_shot, or pinned shots in objective.context=window, every view has its own"
                " positions; use parallel.micro_batch=1"
            )

    def passes(self, mesh: Mesh, micro_batch: int | None) -> int:
        return common_passes(divide_batch(stage.batch, mesh, micro_batch)[1] for stage in self.stages if stage.steps)

    def size(self, step: int) -> int:
        """Return the clean latent tokens of a batch; the noisy copy does not count."""
        stage = stage_at(self.stages, step)
        return stage.batch * stage.chunks * self.tokens_per_chunk

    def shares(self, step: int, mesh: Mesh, micro_batch: int | None) -> list[ViewBatch]:
        """Read this rank's part; a thread reads that of the next step at the same time."""
        stage = stage_at(self.stages, step)
        size, passes = divide_batch(stage.batch, mesh, micro_batch)
        if self.coreset is not None:
            self.coreset.prepare(self._place(step, 0), self._place(step, stage.batch - 1))
        draw = self._draw(step)
        if self._ahead is not None and self._ahead[0] == step:
            read = self._ahead[1].result()
        else:
            read = self._read_all(step, draw, mesh)
        draw, tensors = self._readable(step, draw, read, mesh)
        last = self._place(step + 1, stage_at(self.stages, step + 1).batch - 1)
        if self.coreset is None or self.coreset.covers(last):
            following = self._draw(step + 1)
            self._ahead = (step + 1, self._reader.submit(self._read_all, step + 1, following, mesh))
        own = stage.chunks // mesh.sequence
        chunks = range(mesh.place * own, (mesh.place + 1) * own)
        frames = slice(chunks.start * self.clips.chunk_frames, chunks.stop * self.clips.chunk_frames)
        mean_weight = (draw.loss_mask.sum() / (mesh.world * passes)).to(self.device)
        shares = []
        for number in range(passes):
            views = range(number * size, (number + 1) * size)
            numbers = [mesh.replica * passes * size + view for view in views]
            clean, features = (
                torch.stack([tensors[view][part] for view in views]).to(self.device, non_blocking=True)
                for part in (0, 1)
            )
            cuts = None
            if self.cuts_matter:
                (view,) = numbers
                first = draw.first_chunk[view]
                cuts = tuple(self.clips.clips[draw.clip[view]].cuts[first : first + stage.chunks])
            shares.append(
                ViewBatch(
                    clean,
                    *(self._noise(kind, step, numbers, chunks, clean.shape) for kind in ("noise", "context")),
                    *(
                        x[numbers, frames].to(self.device, non_blocking=True)
                        for x in (draw.sigma, draw.context_sigma, draw.loss_mask)
                    ),
                    ids=None,
                    mask=None,
                    features=features,
                    mean_weight=mean_weight,
                    cuts=cuts,
                    origin=self._origin(step, draw, numbers, chunks),
                    first_view=numbers[0],
                )
            )
        return shares

    def _readable(
        self, step: int, draw: _Draw, read: list[_Read], mesh: Mesh
    ) -> tuple[_Draw, list[tuple[Tensor, Tensor]]]:
        """Replace clips that some rank could not read; all ranks choose the same replacements."""
        first = mesh.replica * len(read)
        while self.config.max_bad:
            failed = torch.zeros(len(draw.clip), device=self.device)
            for place, result in enumerate(read):
                if isinstance(result, UserError):
                    failed[first + place] = 1
                    print(f"skipped: {result}", file=sys.stderr, flush=True)
            views = mesh.sum(failed).nonzero().flatten().tolist()
            if not views:
                break
            self.unreadable |= {draw.clip[view] for view in views}
            if len(self.unreadable) > min(self.config.max_bad, len(self.clips.clips) - 1):
                raise UserError(
                    f"{len(self.unreadable)} clips cannot be read, more than views.max_bad={self.config.max_bad}:"
                    f" numbers {', '.join(map(str, sorted(self.unreadable)))} of the data set; repair or remove them"
                )
            draw = self._draw(step)
            again = self._read(step, draw, mesh, [view - first for view in views])
            read = [again.get(place, result) for place, result in enumerate(read)]
        return draw, [_checked(result) for result in read]

    def _origin(self, step: int, draw: _Draw, numbers: Sequence[int], chunks: range) -> Origin:
        # the first frame of a chunk may be a given image, the last one never is
        last = [(chunk + 1) * self.clips.chunk_frames - 1 for chunk in chunks]
        frames = slice(chunks.start * self.clips.chunk_frames, chunks.stop * self.clips.chunk_frames)
        own = torch.tensor(list(numbers))
        return Origin(
            step=step,
            samples=tuple(numbers),
            chunks=tuple(chunks),
            sigma_BQ=draw.sigma[own][:, last],
            trained_BQ=draw.loss_mask[own][:, last] > 0,
            given_BT=(draw.sigma[own, frames] == 0).float().to(self.device, non_blocking=True),
        )

    def _draw(self, step: int) -> _Draw:
        config, stage, chunk_frames = self.config, stage_at(self.stages, step), self.clips.chunk_frames
        count, chunks = stage.batch, stage.chunks
        generator = seeded(self._generator, self.seed, "clip views", step)

        def rand(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator)

        clip = [self.clip_of(step, view) for view in range(count)]
        latest = self.clips.num_chunks - chunks
        later = 1 + torch.randint(max(latest, 1), (count,), generator=generator)
        # a view of one chunk that does not begin its clip would be context alone
        always_opens = latest == 0 or chunks == 1
        first_chunk = torch.where((rand(count) < config.start_fraction) | always_opens, 0, later)
        opening = first_chunk == 0
        sigma = self.sigmas[torch.randint(len(self.sigmas), (count, chunks), generator=generator)]
        noisy_context = rand(count, chunks) < config.context_noise_fraction
        context_sigma = config.context_noise_max * rand(count, chunks) * noisy_context
        is_given = opening & (rand(count) < config.image_fraction)
        sigma, context_sigma = (x.repeat_interleave(chunk_frames, dim=1) for x in (sigma, context_sigma))
        loss_mask = torch.ones_like(sigma)
        loss_mask[:, :chunk_frames] = opening[:, None].float()
        sigma[:, 0] = torch.where(is_given, 0.0, sigma[:, 0])
        loss_mask[:, 0] = torch.where(is_given, 0.0, loss_mask[:, 0])
        dropped = rand(count) < config.prompt_dropout
        return _Draw(clip, first_chunk.tolist(), dropped.tolist(), sigma, context_sigma, loss_mask)

    def _place(self, step: int, view: int) -> int:
        """Return the place of a view among all views; all earlier steps have gone through the epochs view by view."""
        done = 0
        for stage in self.stages:
            inside = min(step, stage.steps) if stage is not self.stages[-1] else step
            done, step = done + inside * stage.batch, step - inside
        return done + view

    def clip_of(self, step: int, view: int) -> int:
        """Return the number of the clip of a view."""
        if self.coreset is not None:
            return self._instead(self.coreset.clip(self._place(step, view)))
        epoch, place = divmod(self._place(step, view), len(self.clips.clips))
        if epoch not in self._orders:
            generator = seeded(torch.Generator(), self.seed, "epoch", epoch)
            self._orders = {key: order for key, order in self._orders.items() if key == epoch - 1}
            self._orders[epoch] = torch.randperm(len(self.clips.clips), generator=generator).tolist()
        return self._instead(self._orders[epoch][place])

    def _instead(self, clip: int) -> int:
        """Return a clip, or the next one that can be read."""
        while clip in self.unreadable:
            clip = (clip + 1) % len(self.clips.clips)
        return clip

    def _read_all(self, step: int, draw: _Draw, mesh: Mesh) -> list[_Read]:
        places = range(len(draw.clip) // mesh.replicas)
        results = self._read(step, draw, mesh, places)
        return [results[place] for place in places]

    def _read(self, step: int, draw: _Draw, mesh: Mesh, places: Iterable[int]) -> dict[int, _Read]:
        """Read latents and features of the own frames of some views, by their places among those of this replica."""
        stage = stage_at(self.stages, step)
        if stage.chunks % mesh.sequence:
            raise ConfigError(f"{stage.chunks} chunks do not divide into {mesh.sequence} ranks; use a multiple")
        own, per_replica = stage.chunks // mesh.sequence, stage.batch // mesh.replicas
        read: dict[int, _Read] = {}
        for place in places:
            if not 0 <= place < per_replica:
                continue
            view = mesh.replica * per_replica + place
            index = draw.clip[view]
            first = draw.first_chunk[view] + mesh.place * own
            clip = self.clips.clips[index]
            captions = video_texts(clip.captions, clip.cuts, cut_prefix=self.cut_prefix)[first : first + own]
            texts = [self.clips.text("" if draw.dropped[view] else caption) for caption in captions]
            try:
                latents = self.clips.latents(
                    index, first * self.clips.chunk_frames, (first + own) * self.clips.chunk_frames
                )
            except UserError as error:
                read[place] = error
                continue
            pair = latents, torch.stack(texts)
            read[place] = (pair[0].pin_memory(), pair[1].pin_memory()) if self.device.type == "cuda" else pair
        return read

    def _noise(self, kind: str, step: int, views: Sequence[int], chunks: range, shape: torch.Size) -> Tensor:
        """Draw noise chunk by chunk, so that it does not depend on the rank that draws it."""
        _, channels, _, height, width = shape
        size = (channels, self.clips.chunk_frames, height, width)

        def of_chunk(view: int, chunk: int) -> Tensor:
            generator = seeded(self._noise_generator, self.seed, kind, step, view, chunk)
            return torch.randn(size, generator=generator, device=self.device)

        return torch.stack([torch.cat([of_chunk(view, chunk) for chunk in chunks], dim=1) for view in views])


def _checked(result: _Read) -> tuple[Tensor, Tensor]:
    if isinstance(result, UserError):
        raise result
    return result


@dataclass(frozen=True)
class RandomClip:
    """A clip without content; every chunk has its own caption."""

    captions: tuple[str, ...]
    cuts: tuple[bool, ...]


class RandomClips:
    """Clips of noise in the shapes of a model, to time a run without data."""

    def __init__(self, *, chunks: int, chunk_frames: int, latents: tuple[int, int, int], text: tuple[int, int]) -> None:
        """latents: C, H, W. text: J, D."""
        self.num_chunks, self.chunk_frames = chunks, chunk_frames
        self._latents, self._text = latents, text
        self.clips = [RandomClip(tuple(map(str, range(chunks))), (True, *(False,) * (chunks - 1)))]

    def latents(self, index: int, first: int, last: int) -> Tensor:
        channels, height, width = self._latents
        return torch.randn(channels, last - first, height, width, generator=torch.Generator().manual_seed(index))

    def text(self, caption: str) -> Tensor:
        return torch.randn(self._text, generator=seeded(torch.Generator(), caption))
