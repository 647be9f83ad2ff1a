"""A run's numbers where Prometheus finds them: held in Ray's metrics, which every node's agent serves."""

import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge, Metric

from orchestrator.events import Listener
from orchestrator.meter import METRICS, RUN_LABELS, Meter, Reading
from orchestrator.plan import Plan

AGAIN_EVERY_S = 1.0


def listener_for(plan: Plan, own_ray: bool) -> Listener:
    """Gauges, where there is an agent that serves: a Ray of the command's own has none."""
    return Listener() if own_ray else Gauges(plan)


class Gauges(Listener):
    """Told by the journal of all that it writes down; costs some microseconds a report, off the workers' processes.

    Ray exports a gauge only in the interval in which it was set, and its agent drops it two intervals later: all are
    set again every second, also while nothing happens.

    Ray's agent of this node takes the numbers every RAY_metrics_report_interval_ms (10,000). Histograms are not used:
    Ray 2.60 hands on their buckets only, and makes up the sums from the middles of the buckets
    (record_histogram_aggregated_batch in ray/_private/telemetry/open_telemetry_metric_recorder.py).
    """

    def __init__(self, plan: Plan) -> None:
        self._meter = Meter(plan.config.checkpoint_every)
        run = dict(zip(RUN_LABELS, (plan.config.name, plan.workload), strict=True))
        self._held: dict[str, Metric] = {}
        self._gauges: dict[str, float] = {}
        for metric in METRICS:
            made = Counter if metric.counts else Gauge
            held = made(metric.name, metric.help, (*RUN_LABELS, *metric.labels)).set_default_tags(run)
            self._held[metric.name] = held
            for values in metric.known if metric.counts else ():
                # Counter.inc refuses 0, with which Prometheus wants a counter to begin.
                held._record(0.0, dict(zip(metric.labels, values, strict=True)))
        threading.Thread(target=self._again, name="prometheus", daemon=True).start()

    def steps(self, records: list[dict[str, Any]]) -> None:
        """See events.Listener."""
        self._take(self._meter.steps(records))

    def event(self, record: Mapping[str, Any]) -> None:
        """See events.Listener."""
        self._take(self._meter.event(record))

    def recall(self, events: list[dict[str, Any]], newest: list[dict[str, Any]]) -> None:
        """See events.Listener: gauges are as they were; what the counters had, the agent still has and adds to."""
        readings = [r for event in events for r in self._meter.event(event)] + self._meter.steps(newest)
        self._take(r for r in readings if not r.metric.counts)

    def _take(self, readings: Iterable[Reading]) -> None:
        for reading in readings:
            metric, value = reading.metric, float(reading.value)
            if not metric.counts:
                self._gauges[metric.name] = value
            if value or not metric.counts:
                self._held[metric.name]._record(value, dict(zip(metric.labels, reading.labels, strict=True)))

    def _again(self) -> None:
        while True:
            for name, value in list(self._gauges.items()):
                self._held[name]._record(value)
            time.sleep(AGAIN_EVERY_S)
