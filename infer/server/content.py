"""Files over HTTP: whole or in part (RFC 9110, sections 13 and 14), and what there is so far of one that grows."""

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
HEAD_ONLY = "head_only"  # in the state of a request: its answer has no body

log = logging.getLogger(__name__)


class FileContent(Response):
    """A file that is opened when it is sent, so that one that is deleted meanwhile is sent to its end."""

    def __init__(self, path: Path, *, media_type: str, download: bool = False, grows: bool = False) -> None:
        """download: let browsers save it under its name. grows: it may also get shorter; it has no ranges."""
        super().__init__(media_type=media_type)
        del self.headers["content-length"]
        self._path, self._grows = path, grows
        if download:
            self.headers["content-disposition"] = f'attachment; filename="{path.name}"'

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises HTTPException: 404 without a file, 400 for a malformed range, 416 for one outside of the file."""
        try:
            file = await run_in_threadpool(self._path.open, "rb")
        except OSError as error:
            raise HTTPException(HTTPStatus.NOT_FOUND, "there is no such file") from error
        with file:
            size, headers = os.fstat(file.fileno()).st_size, Headers(scope=scope)
            start, end, status = 0, size, HTTPStatus.OK
            if not self._grows:
                self._describe(os.fstat(file.fileno()))
                if _has_this(headers, self.headers["etag"]):
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
                    return  # the connection is cut: the length that was promised is not there
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
    """Return the first byte and the byte after the last that a Range header asks for; None for the whole file.

    Units other than bytes, and several ranges, are answered with the whole file. Raises HTTPException with 400 for
    what is malformed and with 416 for what lies outside of a file of this size.
    """
    unit, equals, text = value.partition("=")
    if equals and unit.strip().lower() != "bytes":
        return None
    matches = [ONE_RANGE.fullmatch(part.strip()) for part in text.split(",") if part.strip()]
    spans = [(match[1], match[2]) for match in matches if match is not None]
    is_wrong = any(not (first or last) or (first and last and _number(first) > _number(last)) for first, last in spans)
    if len(spans) < len(matches) or not spans or is_wrong:
        raise HTTPException(HTTPStatus.BAD_REQUEST, "the header Range is malformed; send bytes=FIRST-LAST")
    if len(spans) > 1:
        return None
    first, last = spans[0]
    start = _number(first) if first else max(size - _number(last), 0)
    end = min(_number(last) + 1, size) if first and last else size
    if start >= size:
        headers = {"Content-Range": f"bytes */{size}"}
        raise HTTPException(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, f"the file has {size} bytes", headers)
    return start, end


async def _read(file: BinaryIO, start: int, end: int) -> AsyncIterator[bytes]:
    """Read the bytes between two places; fewer if the file becomes shorter meanwhile."""
    file.seek(start)
    while start < end and (data := await run_in_threadpool(file.read, min(end - start, READ_BYTES))):
        start += len(data)
        yield data


def _has_this(headers: Headers, etag: str) -> bool:
    known = [name.strip().removeprefix("W/") for name in headers.get("if-none-match", "").split(",")]
    return etag in known or "*" in known


def _number(digits: str) -> int:
    return int(digits) if len(digits) <= MAX_DIGITS else sys.maxsize
