"""Settings of a server, and the limits on what its clients can use."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """Limits on what clients request and on how long they take.

    sessions: number of live streams at the same time.
    message_bytes: size of a WebSocket message, of the body of a request, and of a prompt in a larger body.
    upload_bytes: size of the body of a request with a picture or a video.
    footage_seconds: length of a video that another one continues.
    parallel_uploads: number of requests with bodies above `message_bytes` at the same time.
    head_seconds: time for a client to send the head of a request.
    body_seconds: time for a client to send the body of a request; fast bodies may take longer, see `connections`.
    send_seconds: time without progress after which the connection of an unread answer is closed.
    waiting_connections: number of connections that have not sent a whole request; the oldest is closed first.
    parallel_requests: number of requests that are answered at the same time.
    connections: number of connections of all kinds.
    first_message_seconds: time for a client to send the first message of a WebSocket.
    receive_seconds: time that a stream waits for a client that receives nothing.
    handover_seconds: time that `continue` waits for the previous connection of the stream to end.
    stream_seconds: length of a live stream.
    job_seconds: length of a job's video.
    queued_jobs: number of queued jobs.
    job_shots: number of shots of a job.
    stream_shots: number of shots of a live stream, past ones included.
    waiting_segments: number of segments that are encoded and not yet sent.
    waiting_messages: number of unsent answers from which on no more messages of the client are read.
    snapshots: number of snapshots that are kept for `continue`; the oldest are deleted first.
    references: number of uploaded pictures and videos that are kept for `start`; the oldest are deleted first.
    """

    sessions: int = 2
    message_bytes: int = 64 * 1024
    upload_bytes: int = 32 * 2**20
    footage_seconds: float = 120.0
    parallel_uploads: int = 8
    head_seconds: float = 10.0
    body_seconds: float = 10.0
    send_seconds: float = 30.0
    waiting_connections: int = 512
    parallel_requests: int = 256
    connections: int = 900  # most systems limit a process to 1024 open files
    first_message_seconds: float = 10.0
    receive_seconds: float = 30.0
    handover_seconds: float = 60.0
    stream_seconds: float = 3600.0
    job_seconds: float = 600.0
    queued_jobs: int = 16
    job_shots: int = 64
    stream_shots: int = 1000
    waiting_segments: int = 2
    waiting_messages: int = 64
    snapshots: int = 8
    references: int = 8


@dataclass(frozen=True)
class ServerSettings:
    """Settings that a server is started with.

    folder: folder of the generated videos.
    model: name of the model in answers to clients.
    token: secret that clients must send, or None. Without a token only this machine can connect, and a request with
        the name of another host is refused because it is a sign of DNS rebinding.
    public_hosts: host names that are accepted without a token, for a proxy on this machine that is reached under them.
    """

    folder: Path
    model: str = "tiny"
    token: str | None = None
    public_hosts: frozenset[str] = frozenset()
    limits: Limits = field(default_factory=Limits)
