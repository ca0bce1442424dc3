"""Files over HTTP: whole, in part (RFC 9110, sections 13 and 14), or the current content of a growing file."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import AsyncIterator
from email.utils import formatdate
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO

from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

READ_BYTES = 64 * 1024
ONE_RANGE = re.compile(r"([0-9]*)\s*-\s*([0-9]*)")
MAX_DIGITS = 18
HEAD_ONLY = "head_only"  # key in the state of a request whose answer has no body

log = logging.getLogger(__name__)


class FileContent(Response):
    """The content of a file. The file is opened once, so it is sent completely even if it is deleted during that."""

    def __init__(self, path: Path, *, media_type: str, download: bool = False, grows: bool = False) -> None:
        """path: file to send. download: whether browsers save it under its name. grows: whether it is being written.

        A growing file may also become shorter. It is sent without a length and without ranges.
        """
        super().__init__(media_type=media_type)
        del self.headers["content-length"]
        self._path, self._grows = path, grows
        if download:
            self.headers["content-disposition"] = f'attachment; filename="{path.name}"'

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer. Raises HTTPException: 404 (no file), 400 (malformed range), 416 (range beyond the end)."""
        del receive  # the request has no body
        try:
            file = await run_in_threadpool(self._path.open, "rb")
        except OSError as error:
            raise HTTPException(HTTPStatus.NOT_FOUND, "the file does not exist") from error
        with file:
            size, headers = os.fstat(file.fileno()).st_size, Headers(scope=scope)
            start, end, status = 0, size, HTTPStatus.OK
            if not self._grows:
                self._describe(os.fstat(file.fileno()))
                if _is_cached(headers, self.headers["etag"]):
                    end, status = 0, HTTPStatus.NOT_MODIFIED
                elif (span := self._span(headers, size)) is not None:
                    (start, end), status = span, HTTPStatus.PARTIAL_CONTENT
                    self.headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
                if status != HTTPStatus.NOT_MODIFIED:
                    self.headers["content-length"] = str(end - start)
            await send({"type": "http.response.start", "status": status.value, "headers": self.raw_headers})
            if not scope["state"].get(HEAD_ONLY):
                async for data in _read(file, start, end):
                    start += len(data)
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                if start < end and not self._grows:
                    log.warning("%s became shorter while it was sent", self._path)
                    return  # uvicorn closes the connection, because fewer bytes than content-length were sent
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _describe(self, info: os.stat_result) -> None:
        self.headers["accept-ranges"] = "bytes"
        self.headers["last-modified"] = formatdate(info.st_mtime, usegmt=True)
        self.headers["etag"] = f'"{info.st_ino:x}-{info.st_mtime_ns:x}-{info.st_size:x}"'

    def _span(self, headers: Headers, size: int) -> tuple[int, int] | None:
        condition = headers.get("if-range")
        if condition is not None and condition not in (self.headers["etag"], self.headers["last-modified"]):
            return None
        return None if (value := headers.get("range")) is None else read_range(value, size)


def read_range(value: str, size: int) -> tuple[int, int] | None:
    """Return the first byte and the byte after the last of a Range header, or None for the whole file.

    size: size of the file in bytes. Other units than bytes and multiple ranges are answered with the whole file.
    Raises HTTPException: 400 for a malformed range, 416 for one outside of the file.
    """
    unit, equals, text = value.partition("=")
    if equals and unit.strip().lower() != "bytes":
        return None
    matches = [ONE_RANGE.fullmatch(part.strip()) for part in text.split(",") if part.strip()]
    spans = [(match[1], match[2]) for match in matches if match is not None]
    if len(spans) < len(matches) or not spans or not all(_is_valid(first, last) for first, last in spans):
        raise HTTPException(HTTPStatus.BAD_REQUEST, "the header Range is malformed; expected bytes=FIRST-LAST")
    if len(spans) > 1:
        return None
    first, last = spans[0]
    start = _number(first) if first else max(size - _number(last), 0)
    end = min(_number(last) + 1, size) if first and last else size
    if start >= size:
        headers = {"Content-Range": f"bytes */{size}"}
        message = f"the range starts at byte {start}; the file has {size} bytes"
        raise HTTPException(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, message, headers)
    return start, end


async def _read(file: BinaryIO, start: int, end: int) -> AsyncIterator[bytes]:
    """Yield the bytes from `start` to `end`, fewer if the file becomes shorter while it is read."""
    file.seek(start)
    while start < end and (data := await run_in_threadpool(file.read, min(end - start, READ_BYTES))):
        start += len(data)
        yield data


def _is_valid(first: str, last: str) -> bool:
    """Return whether a range has a first or a last byte, and not in the wrong order."""
    return bool(first or last) and not (first and last and _number(first) > _number(last))


def _is_cached(headers: Headers, etag: str) -> bool:
    tags = [name.strip().removeprefix("W/") for name in headers.get("if-none-match", "").split(",")]
    return etag in tags or "*" in tags


def _number(digits: str) -> int:
    return int(digits) if len(digits) <= MAX_DIGITS else sys.maxsize
