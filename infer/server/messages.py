"""Messages of the WebSocket: strict checks of what clients send, and the text of answers. Protocol: docs/server.md."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from longvideo.infer.options import MAX_GUIDANCE, MAX_SEED, MAX_STEPS
from longvideo.infer.script import MAX_SECONDS, PromptError, check_negative_prompt, check_prompt
from longvideo.infer.server.security import ID_PATTERN
from longvideo.infer.timeline import SwitchMode

if TYPE_CHECKING:
    from longvideo.errors import UserError

MAX_CHUNK = 10**6
MAX_LEAD = 3600.0

ErrorCode = Literal[
    "bad_message",
    "bad_prompt",
    "bad_chunk",
    "bad_reference",
    "too_late",
    "unauthorized",
    "too_many_sessions",
    "not_found",
    "too_slow",
    "shutting_down",
    "storage",
    "internal",
]
Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS, allow_inf_nan=False)]
LeadSeconds = Annotated[float, Field(ge=0, le=MAX_LEAD, allow_inf_nan=False)]
Chunk = Annotated[int, Field(ge=0, le=MAX_CHUNK)]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
Guidance = Annotated[float, Field(ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Id = Annotated[str, Field(pattern=ID_PATTERN)]


class Refusal(Exception):
    """A request that is refused, with the code and the message of the `error` that the client receives."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code: ErrorCode = code


def refusal_of(error: UserError, code: ErrorCode) -> Refusal:
    """Return the refusal of a message. code: that of errors that are not about its prompts."""
    return Refusal("bad_prompt" if isinstance(error, PromptError) else code, str(error))


class ClientMessage(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _FirstMessage(ClientMessage):
    lead_seconds: LeadSeconds | None = None
    slow: Literal["wait", "drop"] = "wait"


class Start(_FirstMessage):
    type: Literal["start"]
    prompt: str
    negative_prompt: str = ""
    seed: Seed = 0
    steps: Steps | None = None
    guidance: Guidance | None = None
    seconds: Seconds | None = None
    input_reference: Id | None = None


class Continue(_FirstMessage):
    type: Literal["continue"]
    session: Id


class SetPrompt(ClientMessage):
    type: Literal["set_prompt"]
    prompt: str
    mode: SwitchMode = "cut"
    negative_prompt: str | None = None


class AddShot(ClientMessage):
    type: Literal["add_shot"]
    prompt: str
    chunk: Chunk
    mode: SwitchMode = "cut"
    negative_prompt: str | None = None


class Seek(ClientMessage):
    type: Literal["seek"]
    chunk: Chunk
    prompt: str | None = None
    mode: SwitchMode = "cut"
    negative_prompt: str | None = None


class Pause(ClientMessage):
    type: Literal["pause"]


class Resume(ClientMessage):
    type: Literal["resume"]


class Played(ClientMessage):
    type: Literal["played"]
    seconds: Annotated[float, Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False)]


class Stop(ClientMessage):
    type: Literal["stop"]


FirstMessage = Start | Continue
LaterMessage = SetPrompt | AddShot | Seek | Pause | Resume | Played | Stop
_MESSAGES: TypeAdapter[FirstMessage | LaterMessage] = TypeAdapter(
    Annotated[FirstMessage | LaterMessage, Field(discriminator="type")]
)


def read_message(text: str | None, *, max_bytes: int) -> FirstMessage | LaterMessage:
    """Parse and check a message. text: JSON, or None for a binary message. Raises Refusal (bad_message, bad_prompt).

    What a prompt must meet for the model, such as its number of tokens, is checked by `PromptRules`.
    """
    if text is None:
        raise Refusal("bad_message", "the message is binary; send JSON as text")
    if (size := len(text.encode("utf-8", "replace"))) > max_bytes:
        raise Refusal("bad_message", f"the message has {size} bytes; expected at most {max_bytes}")
    try:
        message = _MESSAGES.validate_json(text)
    except ValidationError as error:
        raise Refusal("bad_message", first_reason(error.errors(include_url=False, include_input=False))) from error
    try:
        if (prompt := getattr(message, "prompt", None)) is not None:
            check_prompt(prompt, "the prompt")
        if (negative_prompt := getattr(message, "negative_prompt", None)) is not None:
            check_negative_prompt(negative_prompt, "the negative prompt")
    except PromptError as error:
        raise Refusal("bad_prompt", str(error)) from error
    return message


def first_reason(errors: Any) -> str:
    """Return the field and the message of the first pydantic error, without the rejected value."""
    where = ".".join(str(key)[:40] for key in errors[0]["loc"])
    return f"{where}: {errors[0]['msg']}" if where else str(errors[0]["msg"])


def first_field(errors: Any) -> str | None:
    """Return the name of the field or parameter of the first pydantic error, None for the whole body."""
    names = [str(key)[:40] for key in errors[0]["loc"] if key not in ("body", "query", "path")]
    return ".".join(names) or None


def error_text(code: ErrorCode, message: str) -> str:
    """Return an `error` message as JSON text."""
    return message_text("error", code=code, message=message)


def message_text(kind: str, **fields: Any) -> str:
    """Return a message as JSON text in ASCII, so that half surrogate pairs in a prompt are escaped."""
    return json.dumps({"type": kind, **fields}, allow_nan=False)
