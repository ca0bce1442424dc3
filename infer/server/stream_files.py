"""The files of a live stream: its video, and what it takes to go on with it."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from longvideo.errors import UserError
from longvideo.files import read_text, write_text
from longvideo.infer.server.messages import Refusal
from longvideo.infer.session import Session


class StreamRecord(BaseModel):
    """What is kept of a stream beside its frames and the snapshot of its session."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    prompt: str
    seed: int
    steps: int
    guidance: float
    seconds: float | None


class StreamFiles:
    """The files of one stream, under a name that the server made."""

    def __init__(self, folder: Path, name: str) -> None:
        self.video = folder / f"{name}.mp4"
        self.snapshot = folder / f"{name}.safetensors"
        self.record = folder / f"{name}.json"

    def read_record(self) -> StreamRecord:
        """Return the record; raises Refusal with `not_found` where the stream cannot be continued."""
        try:
            if self.snapshot.exists() and self.video.exists():
                return StreamRecord.model_validate_json(read_text(self.record, what="record of a stream"))
        except (UserError, ValidationError) as error:
            raise Refusal("not_found", "the stream cannot be continued: what was kept of it is damaged") from error
        raise Refusal("not_found", "there is no such stream, or it has ended, or too many were left after it")

    def keep(self, session: Session, record: StreamRecord) -> None:
        """Write what `continue` needs; raises UserError where the disk refuses, with what was there unchanged."""
        session.snapshot(self.snapshot)
        write_text(self.record, record.model_dump_json())

    def forget(self) -> None:
        """Drop what `continue` needs; the video stays."""
        self.snapshot.unlink(missing_ok=True)
        self.record.unlink(missing_ok=True)
