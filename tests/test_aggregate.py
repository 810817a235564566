"""Histograms, counters, the cap and the sliding maxima, with a clock of the test's own."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest

from dask_memusage_exporter.aggregate import (
    LABEL_LENGTH,
    OVERFLOW,
    Aggregate,
    Batch,
    Histogram,
    SlidingMaximum,
    checked,
    totals,
)
from dask_memusage_exporter.config import DEFAULT_BUCKETS, MIB
from dask_memusage_exporter.records import TaskMemory

WINDOW = 600.0


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def record(prefix: str, *, peak: int = 0, growth: int | None = None) -> TaskMemory:
    """Return a record of scope process where it has a growth, else shared."""
    return TaskMemory(
        key=f"{prefix}-1",
        task_prefix=prefix,
        worker="",
        start=0.0,
        stop=0.0,
        start_bytes=0,
        peak_bytes=peak,
        growth_bytes=growth,
        scope="shared" if growth is None else "process",
        reason="overlap" if growth is None else None,
        reusable_bytes=None,
        foreign_bytes=0,
        concurrency=1,
        input_bytes=None,
        output_bytes=None,
        status="finished",
        span_id=None,
    )


@pytest.fixture
def clock() -> Clock:
    """A clock that stands until it is moved."""
    return Clock()


def aggregate(clock: Clock, max_prefixes: int = 40) -> Aggregate:
    """Return an aggregate with small bounds."""
    return Aggregate(
        bounds=(10, 20, 40),
        max_prefixes=max_prefixes,
        maximum_window=WINDOW,
        clock=clock,
    )


def count(tasks: Aggregate, one: TaskMemory) -> None:
    """Count a record as a batch of its own."""
    batch = Batch(tasks.bounds)
    batch.observe(one)
    tasks.add(batch.take())


def test_the_default_bounds_are_the_contracts() -> None:
    """1 and 1.5 times 2^k MiB, from 1 MiB to 256 GiB: 37, and infinity makes 38."""
    assert len(DEFAULT_BUCKETS) == 37
    assert DEFAULT_BUCKETS[:5] == (MIB, 3 * MIB // 2, 2 * MIB, 3 * MIB, 4 * MIB)
    assert DEFAULT_BUCKETS[-1] == 256 * 2**30
    assert list(DEFAULT_BUCKETS) == sorted(set(DEFAULT_BUCKETS))


def test_a_value_on_a_bound_is_in_its_bucket() -> None:
    """``le`` is less or equal; what is beyond the last bound is in infinity's alone."""
    histogram = Histogram()
    for value in (0, 10, 11, 20, 21, 40, 41):
        histogram.observe(value, (10, 20, 40))
    assert histogram.snapshot(4) == ([2, 4, 6, 7], 143)


def test_a_batch_adds_up_to_the_same_as_its_records(clock: Clock) -> None:
    """However records are cut into batches, and by whatever worker: sums, counts and maxima."""
    one, many = aggregate(clock), aggregate(clock)
    batches = [Batch(one.bounds), Batch(one.bounds)]
    for number in range(100):
        record_ = record(f"p{number % 3}", peak=number, growth=number if number % 2 else None)
        count(one, record_)
        batches[number % 2].observe(record_)
        if number % 17 == 0:
            many.add(batches[number % 2].take())
    for batch in batches:
        many.add(batch.take())
        assert batch.take() == []
    assert sorted(many.snapshot()) == sorted(one.snapshot())


def test_a_batch_of_keys_that_are_all_prefixes_is_bounded(clock: Clock) -> None:
    """Whoever makes a prefix of every key fills no memory: the rest are the overflow's."""
    batch = Batch((10,))
    for number in range(3 * Batch.most_prefixes):
        batch.observe(record(f"p{number}"))
    taken = dict(batch.take())
    assert len(taken) == Batch.most_prefixes + 1
    tasks = aggregate(clock)
    tasks.add(taken.items())
    assert sum(sum(one.tasks.values()) for one in tasks.snapshot()) == 3 * Batch.most_prefixes


def test_scopes_of_another_version_are_counted_in_the_histograms(clock: Clock) -> None:
    """A worker may know a scope that we do not: its peaks count, its scope is left out."""
    batch = Batch((10, 20, 40))
    batch.observe(record("x", peak=15))
    ((label, (peak, growth, inputs, _, largest)),) = batch.take()
    tasks = aggregate(clock)
    tasks.add(checked([(label, (peak, growth, inputs, (("galaxy", 1),), largest, "more"))], 4))
    (x,) = tasks.snapshot()
    assert x.peak.cumulative[-1] == 1
    assert set(x.tasks.values()) == {0}


def tally(**parts: Any) -> list[Any]:
    """Return one prefix of a batch as it travels: two tasks of 15 bytes, one of them its own."""
    wire = {
        "peak": (((1, 2),), 30),
        "growth": (((0, 1),), 5),
        "input": ((), 0),
        "tasks": (("process", 1), ("shared", 1)),
        "largest": (15, 5),
        **parts,
    }
    return ["x", list(wire.values())]


def test_what_a_worker_sends_is_what_is_checked(clock: Clock) -> None:
    """A batch comes out as it went in, also from connections that make lists of tuples."""
    batch = Batch((10, 20, 40))
    for peak in (0, 15, 99):
        batch.observe(record("x", peak=peak, growth=peak or None))
    taken = batch.take()
    assert checked(taken, 4) == taken
    tasks = aggregate(clock)
    tasks.add(checked([tally()], 4))
    (x,) = tasks.snapshot()
    assert (x.peak, x.growth_maximum) == (([0, 2, 2, 2], 30), 5)


@pytest.mark.parametrize(
    "bad",
    [
        7,
        None,
        "xy",
        [7],
        [["x"]],
        [["x", "abcde"]],
        [["x", [1, 2, 3, 4, 5]]],
        [[7, tally()[1]]],
        [[None, tally()[1]]],
        [[["x"], tally()[1]]],
        [["x", tally()[1][:4]]],
        [tally(peak=(((1, 2),), -1))],
        [tally(peak=(((1, 2),), "30"))],
        [tally(peak=(((1, 2),), 10**400))],
        [tally(peak=(((1, -2),), 30))],
        [tally(peak=(((1, 0.5),), 30))],
        [tally(peak=(((1, True),), 30))],
        [tally(peak=(((999, 2),), 30))],
        [tally(peak=(((4, 2),), 30))],
        [tally(peak=(((-1, 2),), 30))],
        [tally(peak=((("1", 2),), 30))],
        [tally(peak=({1: 2}, 30))],
        [tally(growth=None)],
        [tally(input=((1, 2), 3))],
        [tally(tasks=(("process", -1),))],
        [tally(tasks=(("process", None),))],
        [tally(tasks=((7, 1),))],
        [tally(tasks=7)],
        [tally(largest=(15,))],
        [tally(largest=(15, None))],
        [tally(largest=(15, 5.0))],
        [tally(largest=(-2, 5))],
    ],
    ids=repr,
)
def test_what_is_no_batch_is_refused_as_a_whole(bad: Any) -> None:
    """Whatever is wrong, and wherever: no part of it comes through."""
    with pytest.raises(ValueError, match="not a batch of counts"):
        checked(bad, 4)
    if isinstance(bad, list):
        with pytest.raises(ValueError, match="not a batch of counts"):
            checked([tally(), *bad], 4)


def test_labels_of_others_are_bounded_too() -> None:
    """A worker that does not cut them, or sends what no page can be encoded with."""
    batch = [[prefix, tally()[1]] for prefix in ("x" * 10_000, "bad\udcff")]
    assert [label for label, _ in checked(batch, 4)] == ["x" * LABEL_LENGTH, "bad?"]


def test_growth_counts_only_where_it_is_the_tasks_own(clock: Clock) -> None:
    """A shared record is in the peaks and in its scope's counter, and in no growth."""
    tasks = aggregate(clock)
    count(tasks, record("x", peak=15, growth=5))
    count(tasks, record("x", peak=30))
    (x,) = tasks.snapshot()
    assert x.peak == ([0, 1, 2, 2], 45)
    assert x.growth == ([1, 1, 1, 1], 5)
    assert x.tasks["process"] == x.tasks["shared"] == 1
    assert set(x.tasks.values()) <= {0, 1}


def test_prefixes_beyond_the_cap_count_together(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """They are counted as overflow and said once in the log; those that were first stay."""
    tasks = aggregate(clock, max_prefixes=2)
    with caplog.at_level(logging.WARNING):
        for prefix in ("a", "b", "c", "d", "a", "c"):
            count(tasks, record(prefix, peak=1))
    assert {one.label: sum(one.tasks.values()) for one in tasks.snapshot()} == {
        "a": 2,
        "b": 1,
        OVERFLOW: 3,
    }
    assert tasks.own_labels == 2
    assert tasks.overflow_tasks == 3
    (line,) = caplog.messages
    assert "more than 2 task prefixes; 'c' and all others" in line
    assert "Raise memusage.max-prefixes" in line


def test_a_prefix_named_like_the_overflow_is_part_of_it(clock: Clock) -> None:
    """Nobody can take the name, and it takes nobody's place."""
    tasks = aggregate(clock, max_prefixes=1)
    count(tasks, record(OVERFLOW))
    count(tasks, record("a"))
    count(tasks, record(OVERFLOW))
    assert tasks.own_labels == 1
    assert tasks.overflow_tasks == 2


def test_labels_are_bounded_and_can_be_encoded(clock: Clock) -> None:
    """A prefix of 10 kB is cut; a lone surrogate would make the whole page fail."""
    tasks = aggregate(clock)
    for prefix in ("x" * 10_000, "x" * 10_001, "bad\udcff"):
        count(tasks, record(prefix))
        count(tasks, record(prefix))
    labels = {one.label: sum(one.tasks.values()) for one in tasks.snapshot()}
    assert labels == {"x" * LABEL_LENGTH: 4, "bad?": 2}
    assert tasks.own_labels == 2


def test_maxima_slide(clock: Clock) -> None:
    """The largest of the window, to a tenth of it; then the next one; then none."""
    maximum = SlidingMaximum(WINDOW)
    maximum.observe(100, clock.now)
    clock.now += 300
    maximum.observe(50, clock.now)
    assert maximum.value(clock.now) == 100
    clock.now += 230
    assert maximum.value(clock.now) == 100
    clock.now += 130  # 660 s: a tenth more than the window
    assert maximum.value(clock.now) == 50
    clock.now += 300
    assert maximum.value(clock.now) is None


def test_reading_a_maximum_changes_nothing(clock: Clock) -> None:
    """Two Prometheus servers may scrape: each sees the same."""
    tasks = aggregate(clock)
    count(tasks, record("x", peak=30, growth=7))
    first = tasks.snapshot()
    assert tasks.snapshot() == first
    assert (first[0].peak_maximum, first[0].growth_maximum) == (30, 7)
    count(tasks, record("x", peak=20, growth=9))
    assert (tasks.snapshot()[0].peak_maximum, tasks.snapshot()[0].growth_maximum) == (30, 9)
    clock.now += 2 * WINDOW
    assert (tasks.snapshot()[0].peak_maximum, tasks.snapshot()[0].growth_maximum) == (None, None)


def test_maxima_take_bounded_memory(clock: Clock) -> None:
    """However long it runs: a slot is kept for each tenth of the window."""
    maximum = SlidingMaximum(WINDOW)
    for second in range(0, 100_000, 7):
        maximum.observe(second % 1000, clock.now + second)
    assert len(maximum._slots) <= 10


def test_totals_add_up(clock: Clock) -> None:
    """Over all labels, bucket by bucket."""
    tasks = aggregate(clock, max_prefixes=1)
    for prefix, growth in (("a", 5), ("b", 15), ("c", None)):
        count(tasks, record(prefix, peak=30, growth=growth))
    peak, growth, by_scope = totals(tasks.snapshot(), tasks.bounds)
    assert peak == ([0, 0, 3, 3], 90)
    assert growth == ([1, 2, 2, 2], 20)
    assert by_scope["process"] == 2
    assert by_scope["shared"] == 1


def test_snapshots_are_consistent_while_others_count(clock: Clock) -> None:
    """From any thread: counts of a snapshot agree with each other, and none is lost."""
    tasks = aggregate(clock)
    begun = threading.Barrier(4)

    def count_all(letter: str) -> None:
        begun.wait()
        for i in range(5000):
            count(tasks, record(f"{letter}{i % 20}", peak=i, growth=i % 50))

    threads = [threading.Thread(target=count_all, args=(letter,)) for letter in "abc"]
    for thread in threads:
        thread.start()
    begun.wait()
    while any(thread.is_alive() for thread in threads):
        for one in tasks.snapshot():
            assert one.peak.cumulative[-1] == one.growth.cumulative[-1] == sum(one.tasks.values())
            assert one.peak.cumulative == sorted(one.peak.cumulative)
    for thread in threads:
        thread.join()
    assert sum(one.peak.cumulative[-1] for one in tasks.snapshot()) == 15_000
    assert tasks.own_labels == 40
