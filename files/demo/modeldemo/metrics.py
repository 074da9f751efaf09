"""What the service measures about itself, in Prometheus' text format."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    Metric,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from modeldemo import __version__

disable_created_metrics()  # type: ignore[no-untyped-call]  # a timestamp beside every counter would double the page

# Seconds: from the pico model on a CPU to a 13B model with ten beams.
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
# Tokens a second: from a 13B model on a CPU to the pico model.
RATES = (1, 2.5, 5, 10, 20, 30, 40, 60, 80, 120, 160, 320, 640, 1280)


class Metrics:
    """The figures of one service, in a registry of its own."""

    def __init__(self, model_id: str, revision: str, weights: str = "") -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # resident memory, CPU seconds, start time
        self.registry.register(GpuMemory())
        info = Info("modeldemo", "What is served", registry=self.registry)
        info.info(
            {"version": __version__, "model": model_id, "revision": revision, "weights": weights}
        )
        self.ready = Gauge("modeldemo_ready", "1 when it answers", registry=self.registry)
        self.requests = Counter(
            "modeldemo_requests",
            "HTTP requests by route and status (499: the client left first)",
            ("route", "status"),
            registry=self.registry,
        )
        self.answers = Counter(
            "modeldemo_answers",
            "Answers by outcome: complete, cancelled, late, refused, failed",
            ("outcome",),
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "modeldemo_prompt_tokens", "Tokens of the questions", registry=self.registry
        )
        self.completion_tokens = Counter(
            "modeldemo_completion_tokens",
            "Tokens that the model made",
            registry=self.registry,
        )
        self.pictures_encoded = Counter(
            "modeldemo_pictures_encoded",
            "Pictures that the model has looked at",
            registry=self.registry,
        )
        self.pictures_reused = Counter(
            "modeldemo_pictures_reused",
            "Pictures of questions whose encoding was kept from before",
            registry=self.registry,
        )
        self.answer_seconds = Histogram(
            "modeldemo_answer_seconds",
            "From the model's turn on a question to its last piece, complete answers only",
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.first_token_seconds = Histogram(
            "modeldemo_first_token_seconds",
            "From a question's arrival, waiting included, to its first token",
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.tokens_per_second = Histogram(
            "modeldemo_tokens_per_second",
            "Tokens after the first by the time they took, complete answers only",
            buckets=RATES,
            registry=self.registry,
        )
        self._waiting = Gauge(
            "modeldemo_waiting", "Questions waiting for their turn", registry=self.registry
        )
        self._running = Gauge(
            "modeldemo_running", "Questions being answered", registry=self.registry
        )

    def watch_queue(self, waiting: Callable[[], float], running: Callable[[], float]) -> None:
        """Read the queue's length, and whether the model works, at every scrape."""
        self._waiting.set_function(waiting)
        self._running.set_function(running)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class GpuMemory(Collector):
    """Bytes of GPU memory, read from torch at every scrape; nothing where it uses no GPU."""

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            "modeldemo_gpu_memory_bytes",
            "GPU memory: allocated (tensors), reserved (by torch), free and total (of the device)",
            labels=("device", "name", "kind"),
        )
        # Importing torch takes seconds, and what does not use it has nothing to tell; while another
        # thread imports it, it is there in parts.
        torch = sys.modules.get("torch")
        cuda = getattr(torch, "cuda", None)
        # Not whether there is a GPU: to ask starts the driver, for which this thread has no time.
        if torch is not None and cuda is not None and cuda.is_initialized():
            for device in range(torch.cuda.device_count()):
                if not torch.cuda.memory_reserved(device):
                    continue  # asking a device that is not used would take memory on it
                free, total = torch.cuda.mem_get_info(device)
                kinds = {
                    "allocated": torch.cuda.memory_allocated(device),
                    "reserved": torch.cuda.memory_reserved(device),
                    "free": free,
                    "total": total,
                }
                name = torch.cuda.get_device_name(device)
                for kind, value in kinds.items():
                    family.add_metric((str(device), name, kind), value)
        yield family
