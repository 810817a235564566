"""What the demo says at its end, for people and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from textwrap import wrap
from typing import Any, NamedTuple

from dask_memusage_exporter.cli import summary
from dask_memusage_exporter.cli.summary import PrefixSummary, growth_of
from dask_memusage_exporter.cli.tables import WIDTH, fit, growth, plural, size, table
from dask_memusage_exporter.cli.texts import TextFile, shown
from dask_memusage_exporter.exporters.csv_file import TASK_COLUMNS
from dask_memusage_exporter.measure.scopes import REASONS
from dask_memusage_exporter.records import TaskMemory

#: How many of the worst tasks and of the failed ones are shown.
SHOWN = 5


class Report(NamedTuple):
    """All that is told of a run. Sizes are bytes."""

    folder: str
    #: Whether the folder is of the demo's own making, and gone when this is read.
    generated: bool
    files: Sequence[TextFile]
    workers: int
    threads: int
    seconds: float
    #: Of the tasks that finished, by key.
    records: Mapping[str, TaskMemory]
    #: Why the others failed, by key.
    failed: Mapping[str, str]
    csv_path: str
    rows_lost: int
    #: Addresses of ``/metrics``: the scheduler's and the workers'.
    metrics: tuple[str, list[str]]
    #: Whether they stay up.
    serves: bool
    #: Why tasks that overlap could not be told apart; None: they were, or none can overlap.
    no_jemalloc: str | None = None

    def file_of(self, key: object) -> TextFile:
        """Return the file of a task; the number in its key is the file's."""
        return self.files[int(str(key).split("-", 2)[1])]


def as_text(report: Report) -> str:
    """Return the report for a terminal of 100 columns."""
    prefixes = summary.by_prefix(report.records.values())
    parts = [
        _head(report),
        _prefixes(prefixes),
        _scopes(report, prefixes),
        _worst(report),
        _failed(report),
        _outputs(report),
        _finding(report),
    ]
    return "\n" + "\n\n".join("\n".join(lines) for part in parts if (lines := list(part)))


def _head(report: Report) -> Iterator[str]:
    total = size(sum(file.size for file in report.files))
    yield (
        f"Counted the words of {plural(len(report.files), 'file')}, {total}, in "
        f"{report.seconds:.1f} s with {plural(report.workers, 'worker')} of "
        f"{plural(report.threads, 'thread')}."
    )
    made = "this Python's own sources, one large file beside small ones"
    yield fit(f"Text: {made if report.generated else shown(report.folder)}", WIDTH)


def _prefixes(prefixes: Sequence[PrefixSummary]) -> Iterator[str]:
    head = ("task prefix", "tasks", "peak p50", "p95", "max", "growth p50", "p95", "max")
    rows = [
        (
            fit(one.prefix, 24),
            f"{one.tasks:,}",
            *map(size, one.peak),
            *map(growth, one.growth),
        )
        for one in prefixes
    ]
    yield from table(head, rows, "<>>>>>>>")
    for one in prefixes:
        yield fit(f"worst key: {one.worst.key}", WIDTH)
    yield "Peak: of the worker process while the task ran. Growth: what the task itself added."


def _scopes(report: Report, prefixes: Sequence[PrefixSummary]) -> Iterator[str]:
    for one in prefixes:
        scopes = [scope for scope in ("thread", "process") if scope in one.scopes]
        known = sum(one.scopes[scope] for scope in scopes)
        yield (
            f"Growth is known for {known:,} of {plural(one.tasks, 'task')} "
            f"(scope {' and '.join(scopes) or 'thread or process'})"
            + (". It is not for (scope shared):" if known < one.tasks else ".")
        )
        for reason, count in one.reasons.items():
            yield f"  {count:,} {reason}: {REASONS.get(reason, reason)}"
    records = report.records.values()
    growths = [growth_of(record) for record in records]
    if any(known.exact is None and known.bound is not None for known in growths):
        yield "  <= is a bound: what its process grew by and what it could have reused, together."
    if report.no_jemalloc is not None:
        yield from wrap(
            "What overlaps in a process cannot be told apart without jemalloc: "
            f"{report.no_jemalloc}. Or run with --threads 1.",
            WIDTH,
            initial_indent="  ",
            subsequent_indent="  ",
        )
    elif report.threads > 1:
        yield from wrap(_difference(list(records)), WIDTH)


def _difference(records: Sequence[TaskMemory]) -> str:
    """Return what one would have read without jemalloc, beside what is known with it."""
    text = (
        "Process rose: by how much the worker's memory rose while the task ran. It is all that can "
        "be read without jemalloc, and with several threads it is everybody's."
    )
    found = summary.find(records)
    if found is None:
        return text
    others = [record for record in records if record is not found.worst]
    seem = max(record.peak_bytes - record.start_bytes for record in others)
    need = max((growth_of(record) for record in others), key=lambda known: known.at_most)
    if need.bound is None:
        return text
    return (
        f"{text} By it one of the other tasks would seem to need {size(seem)}; none needed more "
        f"than {growth(need).removeprefix('<= ')}."
    )


def _worst(report: Report) -> Iterator[str]:
    worst = summary.worst_first(report.records.values())[:SHOWN]
    rows = [
        (
            fit(report.file_of(record.key).name, 24),
            size(report.file_of(record.key).size),
            size(record.peak_bytes),
            growth(growth_of(record)),
            size(max(0, record.peak_bytes - record.start_bytes)),
            record.scope + (f"/{record.reason}" if record.reason else ""),
            record.worker.partition("://")[2],
        )
        for record in worst
    ]
    head = ("worst tasks", "file size", "peak", "growth", "process rose", "scope", "worker")
    yield from table(head, rows, "<>>>><<")


def _failed(report: Report) -> Iterator[str]:
    if report.failed:
        yield (
            f"{plural(len(report.failed), 'task')} of {len(report.files):,} failed; the tables "
            "are of the rest:"
        )
    for key, why in list(report.failed.items())[:SHOWN]:
        line = f"{fit(report.file_of(key).name, 30)}: {fit(' '.join(why.split()), 300)}"
        yield from wrap(line, WIDTH, initial_indent="  ", subsequent_indent="    ")
    if len(report.failed) > SHOWN:
        yield f"  and {len(report.failed) - SHOWN:,} more"
    missing = len(report.files) - len(report.failed) - len(report.records)
    if missing:
        yield f"{plural(missing, 'task')} finished without a record."
    if report.rows_lost:
        yield f"{plural(report.rows_lost, 'row')} of the CSV could not be written."


def _outputs(report: Report) -> Iterator[str]:
    yield f"CSV       {report.csv_path}"
    yield f"          One row a task: {', '.join(TASK_COLUMNS)}."
    scheduler, workers = report.metrics
    yield f"/metrics  {scheduler} (scheduler)"
    for number, worker in enumerate(workers):
        yield f"          {worker} (worker {number})"
    if not report.serves:
        yield "          They go with the cluster when the demo ends; --serve keeps it up."


def _finding(report: Report) -> Iterator[str]:
    found = summary.find(list(report.records.values()))
    if found is not None:
        file = report.file_of(found.worst.key)
        worst = "The worst task" if found.certain else "The worst task known"
        yield from wrap(
            f"{worst} needs {size(found.growth_bytes)} beside a median of "
            f"{growth(found.median).replace('<=', 'at most')}: {fit(file.name, 40)} "
            f"({size(file.size)}).",
            WIDTH,
        )


def as_json(report: Report) -> str:
    """Return the report as one JSON document. Sizes are bytes; null is "not known"."""
    records = list(report.records.values())
    found = summary.find(records)
    scheduler, workers = report.metrics
    return json.dumps(
        {
            "input": {
                "folder": report.folder,
                "generated": report.generated,
                "files": len(report.files),
                "bytes": sum(file.size for file in report.files),
            },
            "workers": report.workers,
            "threads": report.threads,
            "seconds": round(report.seconds, 3),
            "prefixes": [_prefix_json(one) for one in summary.by_prefix(records)],
            "worst_tasks": [
                _task_json(report, record) for record in summary.worst_first(records)[:SHOWN]
            ],
            "failed": [
                {"key": key, "file": report.file_of(key).name, "why": why}
                for key, why in report.failed.items()
            ],
            "csv": {"path": report.csv_path, "rows_lost": report.rows_lost},
            "metrics": {"scheduler": scheduler, "workers": workers},
            "finding": None
            if found is None
            else {
                "worst_key": found.worst.key,
                "growth_bytes": found.growth_bytes,
                "certain": found.certain,
                "median_growth_bytes": found.median.exact,
                "median_growth_at_most_bytes": found.median.bound,
            },
        },
        indent=2,
    )


def _prefix_json(one: PrefixSummary) -> dict[str, Any]:
    names = ("p50", "p95", "max")
    return {
        "task_prefix": one.prefix,
        "tasks": one.tasks,
        "peak_bytes": dict(zip(names, one.peak, strict=True)),
        "growth_bytes": {name: g.exact for name, g in zip(names, one.growth, strict=True)},
        "growth_at_most_bytes": {name: g.bound for name, g in zip(names, one.growth, strict=True)},
        "worst_key": one.worst.key,
        "scopes": one.scopes,
        "reasons": one.reasons,
    }


def _task_json(report: Report, record: TaskMemory) -> dict[str, Any]:
    file = report.file_of(record.key)
    return {
        "key": record.key,
        "file": file.name,
        "file_bytes": file.size,
        "start_bytes": record.start_bytes,
        "peak_bytes": record.peak_bytes,
        "growth_bytes": record.growth_bytes,
        "growth_at_most_bytes": growth_of(record).bound,
        "scope": record.scope,
        "reason": record.reason,
        "worker": record.worker,
    }
