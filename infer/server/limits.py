"""What a server gives away at most, and what it is started with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """Bounds on what clients ask for. Lengths in characters, sizes in bytes, waits and videos in seconds.

    head, body: how long a client may take to send those of a request; a body that comes fast may take longer.
    sending: how long a client may take nothing of an answer. waiting: connections that have not sent a whole request;
    the oldest is closed first. answering: requests that are answered at a time. connections: in all.
    first_message: how long a new connection may say nothing. taking: how long a stream waits for a client that takes
    nothing. leaving: how long whoever continues a stream waits for the connection before to be gone.
    shots: of a job. planned_shots: of a stream, those that are over included.
    waiting_segments: made and not yet sent. waiting_messages: answers not yet sent before no more is read.
    snapshots: of streams that can be continued; the oldest go first.
    """

    sessions: int = 2
    message_bytes: int = 64 * 1024
    prompt_length: int = 1000
    head: float = 10.0
    body: float = 10.0
    sending: float = 30.0
    waiting: int = 512
    answering: int = 256
    connections: int = 900  # most systems allow a process 1024 open files
    first_message: float = 10.0
    taking: float = 30.0
    leaving: float = 60.0
    stream_seconds: float = 3600.0
    job_seconds: float = 600.0
    queued_jobs: int = 16
    shots: int = 64
    planned_shots: int = 1000
    waiting_segments: int = 2
    waiting_messages: int = 64
    snapshots: int = 8


@dataclass(frozen=True)
class ServerSettings:
    """What a server is started with.

    folder: where videos go. model: its name for clients. token: None where none is needed; only this machine can
    connect then, and the name of another machine in a request is a sign of DNS rebinding. public_hosts: such names that
    are right nevertheless, because a proxy on this machine is reached under them.
    """

    folder: Path
    model: str = "tiny"
    token: str | None = None
    public_hosts: frozenset[str] = frozenset()
    limits: Limits = field(default_factory=Limits)
