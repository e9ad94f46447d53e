"""Metrics of a server, in Prometheus' format."""

from __future__ import annotations

import re
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from gazeguard.report import Report, Verdict
from gazeguard.serving.batching import BatchQueue
from gazeguard.serving.tasks import Worker

# What a reason of an unchecked caption is counted as: the first whose pattern it matches. Reasons themselves name phrases and
# figures, of which there is no end.
UNCHECKED_REASONS = (
    ("no caption", r"the text is no caption"),
    ("domain", r"far from all that"),
    ("gaze heads", r"No usable gaze heads"),
    ("gate", r"detector is not usable"),
    ("cut off", r"cut off by the length limit"),
    ("caption", r"caption is empty|NUL characters|surrogate pair"),
    ("tokens", r"tokenizer does not know|no token covers"),
    ("context", r"the model's context"),
    ("image", r"Pillow|is damaged|more pixels|nothing in it|processor refuses|data:image|32 bits|images?; expected|image of"),
    ("prompt", r"The prompt contains"),
    ("not judged", r"not judged"),
    ("not read", r"cannot be read|nothing of the caption is judged|names nothing"),
    ("no attention", r"never attended"),
    ("not finite", r"finite"),
    ("detector", r"detector"),
)
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
ROWS = (1, 2, 4, 8, 16, 32, 64)


def reason_of(report: Report) -> str:
    """The reason of a verdict as a label: the main evidence of the most doubtful claim, or why nothing is known."""
    if report.verdict == Verdict.FLAG:
        finding = max(report.flagged, key=lambda finding: finding.risk)
        return finding.reasons[0] if finding.reasons else "other"
    if report.verdict == Verdict.UNCHECKED:
        return next((label for label, pattern in UNCHECKED_REASONS if re.search(pattern, report.reason)), "other")
    return ""


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.verdicts = Counter("gazeguard_verdicts", "Verdicts by reason.", ["verdict", "reason"], registry=self.registry)
        self.requests = Histogram(
            "gazeguard_request_seconds", "Seconds per request.", ["route", "status"], buckets=SECONDS, registry=self.registry
        )
        self.batches = Histogram("gazeguard_batch_rows", "Captions per batch.", buckets=ROWS, registry=self.registry)
        self.busy = Counter("gazeguard_model_seconds", "Seconds that the model was busy.", registry=self.registry)
        self.waiting = Gauge("gazeguard_queue_rows", "Captions that wait.", registry=self.registry)

    def watch(self, queue: BatchQueue, worker: Worker) -> None:
        """Read the number of waiting captions off a queue, and the number of restarts off a worker."""
        self.waiting.set_function(lambda: len(queue))
        self.registry.register(_Restarts(worker))

    def observe_batch(self, rows: int, seconds: float) -> None:
        """Take note of a batch."""
        self.batches.observe(rows)
        self.busy.inc(seconds)

    def observe_request(self, route: str, status: int, seconds: float) -> None:
        """Take note of a request that has been answered."""
        self.requests.labels(route, status).observe(seconds)

    def count(self, report: Report) -> None:
        """Take note of a verdict."""
        self.verdicts.labels(str(report.verdict), reason_of(report)).inc()

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self.registry)


class _Restarts(Collector):
    """Reads off a worker how often it has lost its model."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def collect(self) -> Iterator[CounterMetricFamily]:
        """The counter, as it stands."""
        yield CounterMetricFamily("gazeguard_model_restarts", "Times the model was lost and loaded.", self.worker.restarts)
