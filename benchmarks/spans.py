"""OpenTelemetry: what a task pays for its span, and for metrics over OTLP.

In a real worker that sends to a real receiver, timed as the bracket is (see ``bracket``): on the
task's thread from taking the lock of ``Worker.active_threads`` to the end of what happens when it
is let go, and all that we do on the event loop.

Covers: what stands in a task's way, and beside it the processor time of the worker's process, in
which the threads are that end spans and send.
Does not cover: a receiver that is slow or gone, for which no task waits.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

from benchmarks.bracket import FEEDS, time_tasks
from benchmarks.harness import OURS, Spread, bench, differences, isolated, rounds
from benchmarks.receiver import came, receiver
from benchmarks.report import Result, Table, Target

LIMIT_US = 60

OFF, SPANS, METRICS, BOTH = "ours, off", "ours + spans", "ours + metrics", "ours + both"
#: What is sent, by the variables of OpenTelemetry; None: not a variable is set.
SENT: dict[str, tuple[str, ...] | None] = {
    OURS: None,
    OFF: (),
    SPANS: ("TRACES",),
    METRICS: ("METRICS",),
    BOTH: ("TRACES", "METRICS"),
}


def variables(sent: tuple[str, ...] | None, endpoint: str) -> dict[str, str]:
    """Return the environment of a variant."""
    if sent is None:
        return {}
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_METRIC_EXPORT_INTERVAL": "1000",  # several times in a measurement
        **{f"OTEL_{signal}_EXPORTER": "otlp" if signal in sent else "none"
           for signal in ("TRACES", "METRICS")},
    }  # fmt: skip


def measure(variant: str, feed: str, tasks: int, endpoint: str) -> dict[str, Any]:
    """Run empty tasks on one worker; return what ``bracket.measure`` does, and what was sent."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        del os.environ[name]
    os.environ.update(variables(SENT[variant], endpoint))
    before = came(endpoint)
    with bench(OURS, config={"distributed.scheduler.worker-saturation": FEEDS[feed]}) as it:
        found = time_tasks(it, [], tasks)
        lost = it.metric("dask_worker_task_memory_dropped_records_total", reason="span_export")
    after = came(endpoint)
    return found | {
        "lost": lost,
        "sent": {path: size - before.get(path, 0) for path, size in after.items()},
    }


def together(found: list[dict[str, Any]]) -> list[float]:
    """Return what a task takes on its thread and on the event loop, in us, by round."""
    return [one["median_us"] + one["loop_us"] for one in found]


def run(quick: bool) -> Result:
    tasks, count = (200, 1) if quick else (2000, 5)
    table = Table(["tasks come", "variant", "task's thread", "p90", "event loop", "together",
                   "more than ours", "worker's processor", "spans lost", "sent"], [])  # fmt: skip
    figures: dict[str, Any] = {}
    targets = []
    with receiver() as endpoint:
        for feed in list(FEEDS)[:1] if quick else FEEDS:
            found: dict[str, list[dict[str, Any]]] = {variant: [] for variant in SENT}
            for _, variant in rounds(count, tuple(SENT)):
                found[variant].append(
                    isolated(measure, variant=variant, feed=feed, tasks=tasks, endpoint=endpoint)
                )
            figures[feed] = found
            more = {v: differences(together(found[v]), together(found[OURS])) for v in SENT}
            for variant, all_ in found.items():
                told = {key: Spread.of([one[key] for one in all_]) for key in
                        ("median_us", "p90_us", "loop_us", "cpu_us")}  # fmt: skip
                sent = sum(itertools.chain.from_iterable(one["sent"].values() for one in all_))
                table.rows.append(
                    [feed, variant, f"{told['median_us'].show(0)} us",
                     f"{told['p90_us'].median:.0f} us", f"{told['loop_us'].show(0)} us",
                     f"{Spread.of(together(all_)).show(0)} us",
                     "-" if variant == OURS else f"{more[variant].show(0, sign=True)} us",
                     f"{told['cpu_us'].median:.0f} us", f"{sum(one['lost'] for one in all_):.0f}",
                     f"{sent / len(all_) / 1000:.0f} kB"]
                )  # fmt: skip
            targets.append(
                Target(f"a span, on the task's thread and the event loop, more than ours ({feed})",
                       f"<= {LIMIT_US} us", f"{more[SPANS].show(0)} us",
                       more[SPANS].median <= LIMIT_US)
            )  # fmt: skip
    return Result(
        "spans",
        "Cost: a task's span, and metrics over OTLP",
        f"{tasks} empty tasks on one worker of one thread, after as many as a quarter of it to "
        f"warm up; {count} rounds, each in fresh clusters. A process that takes everything "
        "receives OTLP over HTTP, on the same processors. `task's thread`: as the bracket, start "
        "and stop together, the median of all tasks; `event loop`: the mean a task of all that we "
        "do there, without rows; `together`: their sum. `worker's processor`: time of the whole "
        "process a task, in which Dask's own work and the threads are that end spans and send. "
        "`ours, off`: an endpoint is set and both exporters are `none`; `ours`: no variable is.",
        [table],
        targets,
        figures,
    )
