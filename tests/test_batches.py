"""What a worker's batches may do to the scheduler's page: add counts, all or none, and no more."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
from distributed import Scheduler
from prometheus_client import REGISTRY, generate_latest

from dask_memusage_exporter.aggregate import Batch, fingerprint
from dask_memusage_exporter.config import DEFAULT_BUCKETS
from dask_memusage_exporter.flight import Wreck
from dask_memusage_exporter.records import TaskMemory
from dask_memusage_exporter.scheduler import prepare
from dask_memusage_exporter.scheduler_agent import SchedulerAgent

PREFIX = "dask_scheduler_task_memory_"


def batch(*prefixes: str) -> dict[str, Any]:
    """Return what a worker sends of one task a prefix."""
    counted = Batch(DEFAULT_BUCKETS)
    for prefix in prefixes:
        counted.observe(
            TaskMemory(
                "key", prefix, "worker", 0.0, 1.0, 0, 2**20, 2**20, "process", None, 0, 0, 1, 0, 0,
                "finished", None,
            )
        )  # fmt: skip
    return {
        "worker": "tcp://worker",
        "incarnation": "one",
        "records": counted.records,
        "buckets": len(DEFAULT_BUCKETS),
        "fingerprint": fingerprint(DEFAULT_BUCKETS),
        "prefixes": counted.take(),
        "health": {"seconds": {"start": 0.5}, "dropped": {"disconnected": 2}},
    }


def at_scheduler(test: Callable[[SchedulerAgent], None]) -> None:
    """Run a test with the agent of a real scheduler, on its event loop."""

    async def run() -> None:
        async with Scheduler(dashboard_address="127.0.0.1:0", port=0) as scheduler:
            test(prepare(scheduler, None))

    asyncio.run(run())


def counts(agent: SchedulerAgent) -> dict[str, int]:
    """Return tasks by label; the whole page can be rendered."""
    assert PREFIX.encode() in generate_latest(REGISTRY)
    return {one.label: sum(one.tasks.values()) for one in agent.aggregate.snapshot()}


def bad_label(message: dict[str, Any]) -> None:
    message["prefixes"].append((7, message["prefixes"][0][1]))


def bad_count(message: dict[str, Any]) -> None:
    label, wire = message["prefixes"][-1]
    message["prefixes"][-1] = (label, (*wire[:3], (("process", -5),), wire[4]))


def bad_bucket(message: dict[str, Any]) -> None:
    label, wire = message["prefixes"][-1]
    message["prefixes"][-1] = (label, ((((999, 1),), 0), *wire[1:]))


def other_bounds(message: dict[str, Any]) -> None:
    message["fingerprint"] = fingerprint([2 * bound for bound in DEFAULT_BUCKETS])


def fewer_buckets(message: dict[str, Any]) -> None:
    message["buckets"] = 3


def bad_incarnation(message: dict[str, Any]) -> None:
    message["incarnation"] = ["one"]


@pytest.mark.parametrize(
    "spoil",
    [bad_label, bad_count, bad_bucket, other_bounds, fewer_buckets, bad_incarnation],
)
def test_a_bad_batch_is_left_out_as_a_whole(
    spoil: Callable[[dict[str, Any]], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Its records are counted as lost once, its health is kept, and the log says so once."""

    def test(agent: SchedulerAgent) -> None:
        agent.handle_batch(**batch("a", "b"))
        message = batch("a", "b", "c")
        spoil(message)
        with caplog.at_level(logging.WARNING):
            agent.handle_batch(**message)
            agent.handle_batch(**message)
        assert counts(agent) == {"a": 1, "b": 1}
        assert agent.health.dropped["invalid"] == 6
        assert agent.health.errors["aggregate"] == 2
        assert agent.health.dropped["disconnected"] == 6
        assert len([line for line in caplog.messages if "aggregate failed" in line]) == 1
        # The next one is as good as any.
        agent.handle_batch(**batch("a", "c"))
        assert counts(agent) == {"a": 2, "b": 1, "c": 1}

    at_scheduler(test)


def test_what_was_refused_is_lost_once() -> None:
    """It has come: when its worker dies it is not lost with it again."""

    def test(agent: SchedulerAgent) -> None:
        agent.handle_batch(**batch("a", "b"))
        agent.handle_batch(**{**batch("a", "b", "c"), "buckets": 1})
        agent.batches.end("one", 6)
        assert agent.health.dropped["invalid"] == 3
        assert agent.health.dropped["worker_gone"] == 1
        assert agent.batches._received == {}

    at_scheduler(test)


def test_a_goodbye_whose_answer_was_lost_is_heard_once() -> None:
    """Its worker leaves its file behind, and the next process tells the same again."""

    def test(agent: SchedulerAgent) -> None:
        goodbye = {"worker": "tcp://worker", "incarnation": "one", "observed": 3}
        wreck = Wreck({"incarnation": "one"}, [], 3, 0, None, 0.0)
        agent.handle_batch(**batch("a", "b"))
        for _ in range(2):
            agent.handle_goodbye(**goodbye)
            agent.handle_hello(worker="tcp://next", home={"wrecks": [tuple(wreck)]})
        assert agent.health.dropped["worker_gone"] == 1

    at_scheduler(test)


def test_what_a_nanny_cannot_know_is_told_by_the_file() -> None:
    """It says that its worker ends in order, and not how many records that had made."""

    def test(agent: SchedulerAgent) -> None:
        wreck = Wreck({"incarnation": "one"}, [], 3, 0, None, 0.0)
        agent.handle_batch(**batch("a", "b"))
        agent.handle_goodbye(worker="tcp://worker", incarnation="one")
        assert agent.health.dropped["worker_gone"] == 0
        agent.handle_hello(worker="tcp://next", home={"wrecks": [tuple(wreck)]})
        assert agent.health.dropped["worker_gone"] == 1

    at_scheduler(test)


@pytest.mark.parametrize("records", [-5, "many", None, 1.5])
def test_a_batch_of_no_number_of_records_lost_at_least_one(records: Any) -> None:
    """A count that is none is not added to what has been lost, nor to what has come."""

    def test(agent: SchedulerAgent) -> None:
        agent.handle_batch(**{**batch("a"), "records": records})
        assert counts(agent) == {}
        assert agent.health.dropped["invalid"] == 1
        assert agent.batches._received == {}

    at_scheduler(test)


@pytest.mark.parametrize(
    "health",
    [
        "ill",
        ["seconds"],
        {"seconds": 7},
        {"seconds": {"start": -1.0}},
        {"seconds": {"start": "1"}},
        {"seconds": {"start": float("nan")}},
        {"seconds": {"start": float("inf")}},
        {"seconds": {"start": 0.5}, "dropped": {"invalid": -3}},
        {"errors": {"start": None}},
    ],
)
def test_bad_health_takes_no_good_counts_with_it(health: Any) -> None:
    """The tasks are counted; nothing of the worker's own counters is."""

    def test(agent: SchedulerAgent) -> None:
        agent.handle_batch(**{**batch("a"), "health": health})
        assert counts(agent) == {"a": 1}
        assert agent.batches._received == {"one": 1}
        assert agent.health.seconds["start"] == 0
        assert set(agent.health.dropped.values()) == {0}
        assert agent.health.errors["aggregate"] == 1

    at_scheduler(test)


@pytest.mark.parametrize("said", [{}, {"fingerprint": None}, {"fingerprint": "sha:7"}])
def test_workers_of_another_version_are_told_by_their_buckets(said: dict[str, Any]) -> None:
    """Without a fingerprint that we know, the number of buckets has to do; unknown names too."""

    def test(agent: SchedulerAgent) -> None:
        message = {k: v for k, v in batch("a").items() if k != "fingerprint"}
        agent.handle_batch(**message, **said, news="of another version")
        assert counts(agent) == {"a": 1}
        agent.handle_batch(**{**message, "buckets": 3}, **said)
        assert counts(agent) == {"a": 1}
        assert agent.health.dropped["invalid"] == 1

    at_scheduler(test)
