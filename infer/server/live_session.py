"""Start the session of a live stream, or restore it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from longvideo.errors import UserError
from longvideo.infer.pipeline import StreamingPipeline
from longvideo.infer.server.messages import Continue, FirstMessage, Refusal, Start, refusal_of
from longvideo.infer.server.references import NAME, References
from longvideo.infer.server.stream_files import StreamFiles, StreamRecord
from longvideo.infer.session import Session


@dataclass(frozen=True)
class SessionStarter:
    """Starts and restores the sessions of a server.

    model: name of the served model. max_seconds: length of a video whose client states none. references: the uploaded
    pictures and videos that a session may begin with.
    """

    pipeline: StreamingPipeline
    model: str
    max_seconds: float
    references: References

    def begin(self, first: FirstMessage, files: StreamFiles) -> tuple[Session, StreamRecord]:
        """Return the session and the record of a stream. files: those of the stream. Raises Refusal."""
        return self._restored(files) if isinstance(first, Continue) else self._new(first)

    def _restored(self, files: StreamFiles) -> tuple[Session, StreamRecord]:
        record = files.read_record()
        if record.model != self.model:
            message = f"the stream is from the model {record.model}; this server serves {self.model}"
            raise Refusal("not_found", message)
        try:
            return self.pipeline.restore(files.snapshot), record
        except UserError as error:
            raise Refusal("not_found", str(error)) from error

    def _new(self, first: Start) -> tuple[Session, StreamRecord]:
        reference = None if first.input_reference is None else self.references.find(first.input_reference)
        path = None if reference is None else reference.path
        is_video = reference is not None and reference.is_video
        try:
            session = self.pipeline.session(
                first.prompt,
                seconds=first.seconds or self.max_seconds,
                steps=first.steps,
                guidance=first.guidance,
                seed=first.seed,
                image=None if is_video else path,
                video=path if is_video else None,
                negative_prompt=first.negative_prompt,
            )
        except UserError as error:
            raise _without_path(refusal_of(error, "bad_message"), path) from error
        settings = self.pipeline.models.settings
        record = StreamRecord(
            model=self.model,
            prompt=first.prompt,
            negative_prompt=first.negative_prompt,
            seed=first.seed,
            steps=settings.steps if first.steps is None else first.steps,
            guidance=settings.guidance if first.guidance is None else first.guidance,
            seconds=first.seconds,
        )
        return session, record


def _without_path(refusal: Refusal, path: Path | None) -> Refusal:
    """Return a refusal whose message does not name a file of the server."""
    return refusal if path is None else Refusal(refusal.code, str(refusal).replace(str(path), NAME))
