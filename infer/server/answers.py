"""Bodies of requests and answers over HTTP, for validation and for /openapi.json."""

from __future__ import annotations

import re
from dataclasses import asdict
from http import HTTPStatus
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, WithJsonSchema

from longvideo.infer.script import Script, ShotRequest
from longvideo.infer.server.job_store import Job, JobStatus
from longvideo.infer.server.messages import Guidance, Id, Seconds, Seed, Steps

SECONDS_TEXT = r"^[0-9]{1,5}(\.[0-9]{1,6})?$"


def _number(value: object) -> object:
    """Return the number of a text such as "4", which OpenAI's clients send, and other values as they are."""
    return float(value) if isinstance(value, str) and re.fullmatch(SECONDS_TEXT, value) else value


SecondsOrText = Annotated[
    Seconds,
    BeforeValidator(_number),
    WithJsonSchema({"anyOf": [TypeAdapter(Seconds).json_schema(), {"type": "string", "pattern": SECONDS_TEXT}]}),
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ShotBody(_Body):
    prompt: Annotated[str, Field(min_length=1, pattern=r"\S")]
    seconds: Seconds
    cut: bool = True
    negative_prompt: str | None = None


class FileReference(_Body):
    """A picture or a video inside of JSON. image_url: a data URL with the file in base64."""

    image_url: str


class _VideoBody(_Body):
    model: str | None = None
    size: str | None = None
    input_reference: FileReference | None = None
    negative_prompt: str = ""
    seed: Seed = 0
    steps: Steps | None = None
    guidance: Guidance | None = None


class PromptVideo(_VideoBody):
    """One prompt for the whole video."""

    prompt: Annotated[str, Field(min_length=1, pattern=r"\S")]
    seconds: SecondsOrText = 8.0

    def script(self) -> Script:
        """Return the script. Raises UserError."""
        return Script.from_prompts(self.prompt, seconds=self.seconds, negative_prompt=self.negative_prompt)


class ShotsVideo(_VideoBody):
    """A list of shots, each with its own prompt and length."""

    shots: Annotated[list[ShotBody], Field(min_length=1)]

    def script(self) -> Script:
        """Return the script. Raises UserError."""
        shots = (ShotRequest(shot.prompt, shot.seconds, shot.cut, shot.negative_prompt) for shot in self.shots)
        return Script(tuple(shots), self.negative_prompt)


class RemixVideo(_Body):
    """Another prompt for the whole video."""

    prompt: Annotated[str, Field(min_length=1, pattern=r"\S")]


class ErrorDetail(BaseModel):
    """An error in the form of OpenAI's interface. param: name of the field or parameter that is wrong, if it is one."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    error: ErrorDetail


class JobError(BaseModel):
    code: str
    message: str


class ShotAnswer(BaseModel):
    prompt: str
    seconds: float
    cut: bool
    negative_prompt: str | None


class VideoAnswer(BaseModel):
    """A job and its progress. seconds: length as a text such as "4", as in OpenAI's interface."""

    id: Id
    object: Literal["video"] = "video"
    model: str
    status: JobStatus
    progress: Annotated[int, Field(ge=0, le=100)]
    created_at: int
    completed_at: int | None
    expires_at: None = None
    prompt: str
    negative_prompt: str
    remixed_from_video_id: Id | None
    shots: list[ShotAnswer]
    seconds: str
    size: str
    seed: int
    frames: int
    decoder: str | None
    adapters: list[str] | None
    error: JobError | None

    @classmethod
    def of(cls, job: Job, *, model: str, size: str, fps: int) -> VideoAnswer:
        shots = [ShotAnswer(**asdict(shot)) for shot in job.shots]
        return cls(
            id=job.id,
            model=model,
            status=job.status,
            progress=100 * job.frames // job.total_frames,
            created_at=job.created_at,
            completed_at=job.completed_at,
            prompt=shots[0].prompt,
            negative_prompt=job.negative_prompt,
            remixed_from_video_id=job.remixed_from,
            shots=shots,
            seconds=f"{job.total_frames / fps:.3f}".rstrip("0").rstrip("."),
            size=size,
            seed=job.seed,
            frames=job.frames,
            decoder=job.decoder,
            adapters=None if job.adapters is None else list(job.adapters),
            error=None if job.error is None else JobError(code=job.status, message=job.error),
        )


class VideoList(BaseModel):
    object: Literal["list"] = "list"
    data: list[VideoAnswer]
    first_id: Id | None
    last_id: Id | None
    has_more: bool


class VideoDeleted(BaseModel):
    id: Id
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class ModelAnswer(BaseModel):
    """A model that is served. created: time at which the server started, in seconds since 1970."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["longvideo"] = "longvideo"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelAnswer]


class ServerAnswer(BaseModel):
    """The model that is served, and what clients need before they start a video.

    takes_references: whether videos can begin with a picture or continue a video, which needs an encoder.
    max_upload_bytes: size of such a file. max_footage_seconds: length of such a video.
    """

    model: str
    needs_token: bool
    max_seconds: float
    fps: int
    width: int
    height: int
    steps: int
    guidance: float
    decoder: str
    adapters: list[str]
    takes_references: bool
    max_upload_bytes: int
    max_footage_seconds: float
    examples: list[str]


class ReferenceAnswer(BaseModel):
    """A picture or a video for `start`."""

    id: Id
    object: Literal["reference"] = "reference"
    kind: Literal["picture", "video"]


class Health(BaseModel):
    status: Literal["ok"] = "ok"


def errors(*statuses: HTTPStatus) -> dict[int | str, dict[str, Any]]:
    """Return the description of a request's errors for OpenAPI."""
    return {int(status): {"model": ErrorAnswer, "description": status.phrase} for status in statuses}


def content_of(*media_types: str) -> dict[int | str, dict[str, Any]]:
    """Return the description of a file's answers for OpenAPI."""
    content = {media_type: {"schema": {"type": "string", "format": "binary"}} for media_type in media_types}
    statuses = (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT)
    refusals = (HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
    return {
        **{status.value: {"description": status.phrase, "content": content} for status in statuses},
        HTTPStatus.NOT_MODIFIED.value: {"description": HTTPStatus.NOT_MODIFIED.phrase},
        **errors(*refusals),
    }
