"""The body of `POST /v1/videos`: JSON, or a form with a file, as programs for OpenAI's interface send it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from longvideo.errors import UserError, shown
from longvideo.files import WriteError, parse_json, reason
from longvideo.infer.server.answers import FileReference, PromptVideo, ShotsVideo

JSON, MULTIPART, URLENCODED = "application/json", "multipart/form-data", "application/x-www-form-urlencoded"
REFERENCE = "input_reference"
URL_FIELDS = tuple(f"{REFERENCE}[{name}]" for name in FileReference.model_fields)
"""Names under which a form has the fields of a `FileReference`."""
MAX_FORM_FIELDS = 32


class FieldError(UserError):
    """A field of a request is wrong. field: its name, for the answer, which contains its first 40 characters."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field[:40]


@dataclass(frozen=True)
class JobRequest:
    """A request for a video.

    reference: file of its first frame or of the video that it continues, as the client sent it, or None.
    """

    body: PromptVideo | ShotsVideo
    reference: bytes | None


async def read_job_request(request: Request) -> JobRequest:
    """Read the body of a request.

    Raises RequestValidationError and UserError for a body that is wrong, HTTPException for one of an unknown type or a
    form that cannot be parsed, and WriteError where the disk has no space for an upload.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == JSON:
        fields = parse_json(_text(await request.body()), where="the body")
        reference = None
    elif content_type in (MULTIPART, URLENCODED):
        fields, reference = await _read_form(request)
    else:
        message = f"the header Content-Type is {shown(content_type)}; expected {JSON}, {MULTIPART} or {URLENCODED}"
        raise HTTPException(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, message)
    body = _validated(fields, strict=content_type == JSON)
    if body.input_reference is not None:
        reference = _decoded(body.input_reference.image_url)
    return JobRequest(body, reference)


def describe_job_request() -> dict[str, Any]:
    """Return the description of the body for OpenAPI."""
    prompt, shots = (_inlined(body.model_json_schema()) for body in (PromptVideo, ShotsVideo))
    fields = {**prompt["properties"]}
    del fields[REFERENCE]  # a form has a file or the fields of the reference, which objects of JSON schema cannot name
    form = {**prompt, "properties": fields}
    file = {"type": "string", "format": "binary", "description": "picture of the first frame, or video to continue"}
    with_file = {**form, "properties": {**fields, REFERENCE: file}}
    schemas = {JSON: {"anyOf": [prompt, shots]}, MULTIPART: with_file, URLENCODED: form}
    content = {content_type: {"schema": schema} for content_type, schema in schemas.items()}
    return {"requestBody": {"required": True, "content": content}}


async def _read_form(request: Request) -> tuple[dict[str, Any], bytes | None]:
    """Return the fields of a form, and its file. Fields have the structure of JSON, and texts as values."""
    limits = request.app.state.settings.limits
    fields: dict[str, Any] = {}
    reference = None
    try:
        async with request.form(max_files=1, max_fields=MAX_FORM_FIELDS, max_part_size=limits.upload_bytes) as form:
            for name, value in form.multi_items():
                if name.lstrip().startswith("{"):
                    message = "the body is JSON, but its Content-Type is that of a form"
                    raise UserError(f"{message}; send the header Content-Type: {JSON}")
                if name in fields or (name == REFERENCE and reference is not None):
                    raise FieldError(name, f"the form has {shown(name)} more than once; send it once")
                if isinstance(value, UploadFile):
                    if name != REFERENCE:
                        raise FieldError(name, f"{shown(name)} is a file; only {REFERENCE} may be one")
                    reference = await value.read()
                else:
                    fields[name] = value
    except OSError as error:  # large files are stored in the system's folder for temporary files
        raise WriteError(f"cannot store the form: {reason(error)}") from error
    if REFERENCE in fields:
        raise FieldError(REFERENCE, f"{REFERENCE} is text; expected a file, or {URL_FIELDS[0]} with a data URL")
    url_fields = {name: fields.pop(name) for name in URL_FIELDS if name in fields}
    if url_fields:
        if reference is not None:
            raise FieldError(REFERENCE, f"{REFERENCE} is a file and a data URL; send one of them")
        fields[REFERENCE] = {name[len(REFERENCE) + 1 : -1]: value for name, value in url_fields.items()}
    if "shots" in fields:
        fields["shots"] = parse_json(fields["shots"], where="shots")
    return fields, reference


def _validated(fields: Any, *, strict: bool) -> PromptVideo | ShotsVideo:
    """Check the fields of a body. strict: whether numbers must not be texts."""
    if not isinstance(fields, Mapping):
        raise UserError(f"the body is {shown(fields)}; expected an object with a prompt or with shots")
    kind = ShotsVideo if "shots" in fields else PromptVideo
    for name in fields:
        if name not in kind.model_fields:
            known = ", ".join(kind.model_fields)
            raise FieldError(str(name), f"{shown(name)} is not a field; the fields are {known}")
    try:
        return kind.model_validate(fields, strict=strict)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False, include_input=False)) from error


def _decoded(url: str) -> bytes:
    """Return the content of a data URL (RFC 2397) in base64."""
    scheme, _, rest = url.partition(":")
    parameters, comma, data = rest.partition(",")
    if scheme.lower() != "data" or not comma or not parameters.lower().endswith(";base64"):
        message = (
            f"the image_url is {shown(url)}; expected data:image/png;base64,..., as other addresses are not fetched"
        )
        raise FieldError(REFERENCE, message)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FieldError(REFERENCE, f"the image_url is not base64: {error}; encode the file's bytes") from error


def _text(body: bytes) -> str:
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the body is not UTF-8: byte {error.start} is 0x{body[error.start]:02x}") from error


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON schema with its definitions in the places that refer to them."""
    definitions = schema.get("$defs", {})

    def resolved(value: Any) -> Any:
        if isinstance(value, list):
            return [resolved(entry) for entry in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return resolved(definitions[value["$ref"].rpartition("/")[2]])
        return {key: resolved(entry) for key, entry in value.items() if key != "$defs"}

    return resolved(schema)
