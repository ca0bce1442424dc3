"""Generate videos with loaded models, and reuse the memory and graphs of one video for the next."""

from __future__ import annotations

import threading
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from longvideo.checkpoint.parts import TRANSFORMER
from longvideo.errors import UserError
from longvideo.infer.generation import GeneratedChunk, Models, Stages, generate_chunks
from longvideo.infer.loading import load_transformer
from longvideo.infer.reloading import check_reloading
from longvideo.model.transformer import CausalTransformer
from longvideo.rollout import branches

if TYPE_CHECKING:
    from collections.abc import Generator

    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.infer.video_inputs import VideoInputs


class StagePool:
    """Models, the stages of the latest finished video, and the number of videos that are generated, from any thread.

    A video that starts while another one is generated gets its own stages.
    """

    def __init__(self, models: Models) -> None:
        self.models = models
        self._idle: Stages | None = None
        self._running = 0
        self._lock = threading.Lock()

    def generate(self, inputs: VideoInputs) -> Generator[GeneratedChunk, None, None]:
        """Generate a video, or a batch of videos, from inputs that are already checked; yield its chunks.

        The first chunk is returned twice: with its first frame, and with the others.
        """
        with self._counted():
            stages = self.acquire(batch=len(inputs.generators), copies=branches(inputs.guidance))
            chunks = generate_chunks(self.models, stages, inputs)
            try:
                with closing(chunks):
                    yield from chunks
            except GeneratorExit:  # the caller stops before the end
                self.release(stages)
                raise
            self.release(stages)  # not after an error: the state of the stages is unknown then

    def acquire(self, *, batch: int, copies: int) -> Stages:
        """Return the idle stages if they have this size, else new ones, warmed up. Arguments are those of `Stages`."""
        with self._lock:
            stages, self._idle = self._idle, None
        if stages is None or stages.size != (batch, copies):
            stages = None  # its memory is freed before new memory is allocated
            stages = Stages(self.models, batch=batch, copies=copies)
        return stages

    def release(self, stages: Stages) -> None:
        """Return stages that are no longer used; the latest ones are kept for the next video."""
        stages.reset()
        with self._lock:
            self._idle = stages

    def replace_transformer(self, folder: ModelFolder) -> None:
        """Load the transformer of a folder in place of the own one, which is freed first. Videos that begin wait.

        Raises UserError while a video is generated, and, before any weight is read, where a GPU has too little memory.
        After an error in loading, the former transformer is loaded again.
        """
        with self._lock:
            if self._running:
                raise UserError("adapters cannot change while a video is generated; finish or close it first")
            former = self.models.folder
            assert former is not None
            self._idle = None  # its memory is free for the check, and for the other transformer
            check_reloading(self.models, folder)
            try:
                self._load(folder)
            except BaseException:  # an interrupt too: without a transformer the pipeline could generate nothing more
                self._load(former)
                raise

    def _load(self, folder: ModelFolder) -> None:
        empty = folder.build(TRANSFORMER)
        assert isinstance(empty, CausalTransformer)
        # the old weights are freed before new memory is allocated
        self.models = replace(self.models, transformer=empty)
        transformer = load_transformer(folder, self.models.placement, self.models.formats)
        self.models = replace(self.models, transformer=transformer, folder=folder)

    @contextmanager
    def _counted(self) -> Generator[None]:
        with self._lock:
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
