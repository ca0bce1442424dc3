"""Bodies of requests and answers over HTTP, for validation and for /openapi.json."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from longvideo.infer.script import Script, ShotRequest
from longvideo.infer.server.job_store import Job, JobStatus
from longvideo.infer.server.messages import Guidance, Seconds, Seed, Steps, check_prompt_length
from longvideo.infer.server.security import ID_PATTERN

VideoId = Annotated[str, Field(pattern=ID_PATTERN)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ShotBody(_Body):
    prompt: Annotated[str, Field(min_length=1, pattern=r"\S")]
    seconds: Seconds
    cut: bool = True


class _VideoBody(_Body):
    model: str | None = None
    seed: Seed = 0
    steps: Steps | None = None
    guidance: Guidance | None = None


class PromptVideo(_VideoBody):
    """One prompt for the whole video."""

    prompt: Annotated[str, Field(min_length=1, pattern=r"\S")]
    seconds: Seconds = 8.0

    def script(self, max_prompt: int) -> Script:
        """Return the script. max_prompt: number of characters. Raises Refusal or UserError."""
        check_prompt_length(self.prompt, max_prompt)
        return Script.from_prompts(self.prompt, seconds=self.seconds)


class ShotsVideo(_VideoBody):
    """A list of shots, each with its own prompt and length."""

    shots: Annotated[list[ShotBody], Field(min_length=1)]

    def script(self, max_prompt: int) -> Script:
        """Return the script. max_prompt: number of characters. Raises Refusal or UserError."""
        for shot in self.shots:
            check_prompt_length(shot.prompt, max_prompt)
        return Script(tuple(ShotRequest(shot.prompt, shot.seconds, shot.cut) for shot in self.shots))


class ErrorDetail(BaseModel):
    code: str
    message: str


class ErrorAnswer(BaseModel):
    error: ErrorDetail


class ShotAnswer(BaseModel):
    prompt: str
    seconds: float
    cut: bool


class VideoAnswer(BaseModel):
    """A job and its progress."""

    id: VideoId
    object: Literal["video"] = "video"
    model: str
    status: JobStatus
    progress: Annotated[int, Field(ge=0, le=100)]
    created_at: int
    completed_at: int | None
    expires_at: None = None
    prompt: str
    shots: list[ShotAnswer]
    seconds: float
    size: str
    seed: int
    frames: int
    decoder: str | None
    error: ErrorDetail | None

    @classmethod
    def of(cls, job: Job, *, model: str, size: str, fps: int) -> VideoAnswer:
        shots = [ShotAnswer(prompt=shot.prompt, seconds=shot.seconds, cut=shot.cut) for shot in job.shots]
        return cls(
            id=job.id,
            model=model,
            status=job.status,
            progress=100 * job.frames // job.total_frames,
            created_at=job.created_at,
            completed_at=job.completed_at,
            prompt=shots[0].prompt,
            shots=shots,
            seconds=job.total_frames / fps,
            size=size,
            seed=job.seed,
            frames=job.frames,
            decoder=job.decoder,
            error=None if job.error is None else ErrorDetail(code=job.status, message=job.error),
        )


class VideoList(BaseModel):
    object: Literal["list"] = "list"
    data: list[VideoAnswer]
    has_more: bool


class VideoDeleted(BaseModel):
    id: VideoId
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class ServerAnswer(BaseModel):
    """The model that is served, and what clients need before they start a video."""

    model: str
    needs_token: bool
    max_seconds: float
    fps: int
    width: int
    height: int
    steps: int
    guidance: float
    decoder: str
    examples: list[str]


class Health(BaseModel):
    status: Literal["ok"] = "ok"


def errors(*statuses: HTTPStatus) -> dict[int | str, dict[str, Any]]:
    """Return the description of a request's errors for OpenAPI."""
    return {int(status): {"model": ErrorAnswer, "description": status.phrase} for status in statuses}


CONTENT: dict[int | str, dict[str, Any]] = {
    status.value: {
        "description": status.phrase,
        "content": {"video/mp4": {"schema": {"type": "string", "format": "binary"}}},
    }
    for status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT)
}
CONTENT |= {304: {"description": HTTPStatus.NOT_MODIFIED.phrase}}
CONTENT |= errors(HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
