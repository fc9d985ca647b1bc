"""What the service tells Prometheus. The registry is its own, so that a program with another is not disturbed."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

SECONDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1, 2, 4, 8, 16)
USERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class ServiceMetrics:
    """Counters, gauges and histograms; names begin with ``fmrl_``, those of the process with ``process_``."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        of_request = ("route",)
        self._requests = Counter(
            "fmrl_requests", "Answered requests", ("method", "route", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "fmrl_request_seconds",
            "From a request's first line to its answer",
            of_request,
            buckets=SECONDS,
            registry=self._registry,
        )
        self._batch_users = Histogram(
            "fmrl_batch_users", "Histories answered together", ("size",), buckets=USERS, registry=self._registry
        )
        self._sessions_ended = Counter(
            "fmrl_sessions_ended", "Sessions deleted, expired or evicted", ("reason",), registry=self._registry
        )
        self._crashes = Counter("fmrl_crashes", "Requests answered 500; the log has why", registry=self._registry)
        for reason in ("deleted", "expired", "evicted"):
            self._sessions_ended.labels(reason)
        ProcessCollector(registry=self._registry)

    def watch(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        """A gauge whose value is asked for when it is read."""
        Gauge(name, help_text, registry=self._registry).set_function(value)

    def note_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """An answered request; ``route`` is the template of its path, or "unknown"."""
        self._requests.labels(method, route, status).inc()
        self._seconds.labels(route).observe(seconds)

    def note_batch(self, size: int, users: int) -> None:
        """A batch of a size."""
        self._batch_users.labels(size).observe(users)

    def note_session_end(self, reason: str) -> None:
        """A session has gone."""
        self._sessions_ended.labels(reason).inc()

    def note_crash(self) -> None:
        """A request was answered 500."""
        self._crashes.inc()

    def text(self) -> bytes:
        """All of them, in Prometheus' format."""
        return generate_latest(self._registry)
