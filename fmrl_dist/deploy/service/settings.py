"""What a service allows: how much a request may ask for, how much is held, how long a client may take."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class ServiceSettings:
    """Limits. None of them is a request's to change."""

    max_body_bytes: int = MIB
    max_histories: int = 256  # of a request
    max_history: int = 1000  # events of each
    max_k: int = 1000
    max_answer_items: int = 25_600  # of all lists of an answer together: k times histories
    max_filtered: int = 1_000_000  # ids of a list for all, times histories
    max_batch: int = 64  # histories that are answered together
    max_delay_s: float = 0.002  # that a request waits for others
    threads: int = 1  # batches at a time
    max_in_flight: int = 1024  # requests; 503 beyond
    max_connections: int = 4096
    max_buffered_bytes: int = 256 * MIB  # of bodies that are being received
    max_sessions: int = 10_000
    max_session_bytes: int = 256 * MIB
    session_ttl_s: float = 3600.0  # since its last use
    head_timeout_s: float = 10.0  # for a request's first lines, all together
    body_timeout_s: float = 10.0
    write_timeout_s: float = 30.0  # for a client that does not read
    keep_alive_s: int = 30
    grace_s: int = 30  # for requests in flight, at TERM
    token: str | None = None
    hosts: frozenset[str] | None = None  # names in the Host header; None: any
