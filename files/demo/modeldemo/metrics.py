"""What the service measures about itself, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from modeldemo import __version__

disable_created_metrics()  # type: ignore[no-untyped-call]  # a timestamp beside every counter would double the page

# Seconds: from the pico model on a CPU to a 13B model with ten beams.
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)


class Metrics:
    """The figures of one service, in a registry of its own."""

    def __init__(self, model_id: str, revision: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # resident memory, CPU seconds, start time
        info = Info("modeldemo", "What is served", registry=self.registry)
        info.info({"version": __version__, "model": model_id, "revision": revision})
        self.ready = Gauge("modeldemo_ready", "1 when it answers", registry=self.registry)
        self.requests = Counter(
            "modeldemo_requests",
            "HTTP requests by route and status (499: the client left first)",
            ("route", "status"),
            registry=self.registry,
        )
        self.answers = Counter(
            "modeldemo_answers",
            "Answers by outcome: complete, cancelled, refused, failed",
            ("outcome",),
            registry=self.registry,
        )
        self.pieces = Counter(
            "modeldemo_pieces", "Pieces of text that the model produced", registry=self.registry
        )
        self.answer_seconds = Histogram(
            "modeldemo_answer_seconds",
            "From the model's turn on a question to its last piece, complete answers only",
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.first_piece_seconds = Histogram(
            "modeldemo_first_piece_seconds",
            "From a question's arrival, waiting included, to its first piece",
            buckets=BUCKETS,
            registry=self.registry,
        )
        self._waiting = Gauge(
            "modeldemo_waiting", "Questions waiting for their turn", registry=self.registry
        )

    def watch_queue(self, waiting: Callable[[], float]) -> None:
        """Read the queue's length from `waiting` at every scrape."""
        self._waiting.set_function(waiting)

    def text(self) -> bytes:
        return generate_latest(self.registry)
