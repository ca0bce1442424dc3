"""The files of a live stream: its video, and the snapshot and record that `continue` needs."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from longvideo.errors import UserError
from longvideo.files import read_text, write_text
from longvideo.infer.server.messages import Refusal
from longvideo.infer.session import Session


class StreamRecord(BaseModel):
    """Properties of a stream that are stored in addition to its frames and the snapshot of its session."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    prompt: str
    negative_prompt: str = ""
    seed: int
    steps: int
    guidance: float
    seconds: float | None


class StreamFiles:
    """The paths of one stream's files. name: the stream's id."""

    def __init__(self, folder: Path, name: str) -> None:
        self.video = folder / f"{name}.mp4"
        self.snapshot = folder / f"{name}.safetensors"
        self.record = folder / f"{name}.json"

    def read_record(self) -> StreamRecord:
        """Return the record. Raises Refusal (not_found) where the stream cannot be continued."""
        try:
            if self.snapshot.exists() and self.video.exists():
                return StreamRecord.model_validate_json(read_text(self.record, what="record of a stream"))
        except (UserError, ValidationError) as error:
            message = "the stream cannot be continued because its files are damaged; start a new video"
            raise Refusal("not_found", message) from error
        message = "the stream does not exist, has ended, or is older than all snapshots; start a new video"
        raise Refusal("not_found", message)

    def save(self, session: Session, record: StreamRecord) -> None:
        """Write the snapshot and the record. Raises UserError, with existing files unchanged, where that fails."""
        session.snapshot(self.snapshot)
        write_text(self.record, record.model_dump_json())

    def discard(self) -> None:
        """Delete the snapshot and the record. The video stays."""
        self.snapshot.unlink(missing_ok=True)
        self.record.unlink(missing_ok=True)
