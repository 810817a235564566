"""A large cluster on one scheduler: what 10,000 workers' reports cost it, and its page.

No worker process runs: the batches that 10,000 workers would send in their heartbeat's interval
(51 s at that size, as Dask scales it) are made by the workers' own ``Batch`` and given to a real
scheduler's agent, one handler call a batch, as its stream does. Deserialising them is measured
apart, with the serialiser of Dask's streams.
"""

from __future__ import annotations

import asyncio
import gc
import random
import resource
import time
from typing import Any

import dask
import psutil
from distributed import Scheduler
from distributed.protocol import dumps, loads
from prometheus_client import REGISTRY, generate_latest

from benchmarks.harness import Spread, isolated
from benchmarks.report import Result, Table, Target
from dask_memusage_exporter.aggregate import Batch
from dask_memusage_exporter.config import DEFAULT_BUCKETS
from dask_memusage_exporter.records import TaskMemory
from dask_memusage_exporter.reporter import BATCH_OP
from dask_memusage_exporter.scheduler import prepare

#: Dask's own rule, ``distributed.scheduler.heartbeat_interval``: seconds at so many workers.
INTERVAL = {10_000: 10_000 / 200 + 1, 500: 500 / 200 + 1}


def run(quick: bool) -> Result:
    workers = 500 if quick else 10_000
    rows, figures = [], {}
    for cap in (40, 100):
        found = isolated(feed, workers=workers, prefixes=100, tasks=100, cap=cap)
        figures[f"cap_{cap}"] = found
        render = Spread(*found["render_ms"])
        rows.append(
            [
                str(cap),
                f"{found['us_a_record']:.2f} us",
                f"{found['us_a_batch']:.0f} us",
                f"{found['ms_a_second']:.2f} ms",
                f"{found['rss_mib']:.1f} MiB",
                f"{render.show(1)} ms",
                f"{found['page_kb']:.0f} kB, {found['lines']} lines",
            ]
        )
    us = figures["cap_40"]["us_a_record"]
    render = figures["cap_40"]["render_ms"][0]
    return Result(
        name="scale",
        title="One scheduler, many workers",
        how=f"{workers} simulated workers with 100 prefixes and 100 tasks each between two "
        "batches; a record's share has handler and deserialising in it. The page is rendered as "
        "Dask does it.",
        tables=[
            Table(
                [
                    "memusage.max-prefixes", "a task record", "a batch", "a second of the cluster",
                    "memory added", "render of /metrics", "page",
                ],
                rows,
            )
        ],
        targets=[
            Target("scheduler's time a task record", "<= 10 us", f"{us:.2f} us", us <= 10),
            Target(
                "render at the default cap, all labels in use", "< 20 ms", f"{render:.1f} ms",
                render < 20,
            ),
        ],
        figures=figures,
    )  # fmt: skip


def feed(*, workers: int, prefixes: int, tasks: int, cap: int) -> dict[str, Any]:
    """Feed a real scheduler; times are of one core."""

    async def go() -> dict[str, Any]:
        async with Scheduler(dashboard_address="127.0.0.1:0", port=0) as scheduler:
            return _feed(scheduler, workers, prefixes, tasks)

    with dask.config.set({"memusage.max-prefixes": cap}):
        return asyncio.run(go())


def _feed(scheduler: Scheduler, workers: int, prefixes: int, tasks: int) -> dict[str, Any]:
    agent = prepare(scheduler, None)
    chance = random.Random(1)
    # Batches are made anew from few: making 10,000 different ones would take all the time.
    messages = [dumps(_message(chance, prefixes, tasks)) for _ in range(100)]
    gc.collect()
    before = psutil.Process().memory_info().rss
    began = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    for number in range(workers):
        message = loads(messages[number % len(messages)])
        del message["op"]
        agent.handle_batch(worker=f"tcp://10.0.0.1:{number}", **message)
    seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime - began
    added = psutil.Process().memory_info().rss - before
    renders = []
    for _ in range(20):
        start = time.perf_counter()
        page = generate_latest(REGISTRY)
        renders.append((time.perf_counter() - start) * 1e3)
    interval = INTERVAL.get(workers, workers / 200 + 1)
    return {
        "us_a_record": seconds / workers / tasks * 1e6,
        "us_a_batch": seconds / workers * 1e6,
        "ms_a_second": seconds / interval * 1e3,
        "rss_mib": added / 2**20,
        "render_ms": list(Spread.of(renders)),
        "page_kb": len(page) / 1e3,
        "lines": page.count(b"\n"),
    }


def _message(chance: random.Random, prefixes: int, tasks: int) -> dict[str, Any]:
    batch = Batch(DEFAULT_BUCKETS)
    for _ in range(tasks):
        peak = int(2 ** chance.uniform(20, 38))
        own = chance.random() < 0.5
        batch.observe(
            TaskMemory(
                "key", f"prefix-{chance.randrange(prefixes)}", "worker", 0.0, 1.0, 0, peak,
                peak // 2 if own else None, "process" if own else "shared", None, 0, 0, 1,
                peak // 4, 0, "finished", None,
            )
        )  # fmt: skip
    return {
        "op": BATCH_OP,
        "incarnation": f"{chance.getrandbits(128):032x}",
        "records": batch.records,
        "buckets": len(DEFAULT_BUCKETS),
        "prefixes": batch.take(),
        "health": {"seconds": {"start": 0.1, "stop": 0.1}},
    }
