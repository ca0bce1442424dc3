"""What a server gives away at most, and what it is started with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """Bounds on what clients ask for. Lengths in characters, sizes in bytes, waits and videos in seconds.

    first_message: how long a new connection may say nothing. taking: how long a stream waits for a client that takes
    nothing. leaving: how long whoever continues a stream waits for the connection before to be gone.
    shots: of a job. planned_shots: of a stream, those that are over included.
    waiting_segments: made and not yet sent. waiting_messages: answers not yet sent before no more is read.
    snapshots: of streams that can be continued; the oldest go first.
    """

    sessions: int = 2
    message_bytes: int = 64 * 1024
    prompt_length: int = 1000
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
    """folder: where videos go. model: its name for clients. token: None where none is needed. loopback: whether only
    this machine can connect, in which case names of other machines in a request are a sign of DNS rebinding."""

    folder: Path
    model: str = "tiny"
    token: str | None = None
    loopback: bool = True
    limits: Limits = field(default_factory=Limits)
