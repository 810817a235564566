"""Panels as plain data; ``factory`` makes Grafana's of them.

Queries are PromQL with ``<name>`` for series, see ``flavours``. A query whose series a flavour has
not is left out, and so is a panel that has no query left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from dask_memusage_exporter.monitoring import rules

#: Colour by the value from which it holds; the first is from below.
Thresholds = tuple[tuple[float | None, str], ...]


def _default(percent: str) -> float:
    """Return the default of a threshold of the alerts, as a share."""
    return float(rules.thresholds()[percent]["default"]) / 100


#: A count that should be none.
NONE_IS_GOOD: Thresholds = ((None, "green"), (1, "red"))
#: A share of the worker's limit. At 0.8 Dask's workers pause; red where the alert fires.
OF_LIMIT: Thresholds = ((None, "green"), (0.8, "orange"), (_default("near-limit-percent"), "red"))
#: How much larger than the baseline, and how large beside it; red where the alert fires.
_REGRESSION = _default("regression-percent")
CHANGE: Thresholds = ((None, "green"), (_REGRESSION / 2, "orange"), (_REGRESSION, "red"))
BESIDE: Thresholds = tuple((None if at is None else 1 + at, color) for at, color in CHANGE)
#: A share of tasks whose growth is known, and of those whose growth is not.
OF_KNOWN: Thresholds = ((None, "orange"), (0.5, "green"))
OF_SHARED: Thresholds = ((None, "green"), (0.5, "orange"), (0.9, "red"))
PLAIN: Thresholds = ((None, "text"),)
#: Any value; what is not there is not red.
ALL_RED: Thresholds = ((None, "text"), (0, "red"))

#: The unit of counts, which are told in full: "short" makes 1 K of 1408.
COUNT = "locale"

#: What tables by prefix are by: the label, and its column's title.
PREFIX = ("task_prefix_name", "Task prefix")

#: Said by panels of worker series where workers are not scraped.
NO_WORKERS = "no worker series"


class Query(NamedTuple):
    """One query and how its series are called."""

    expr: str
    legend: str = ""
    exemplar: bool = False
    #: Of a line that is a border: dashed and red.
    border: bool = False
    #: Of tasks that were killed: red, and points among lines.
    killed: bool = False


class Stat(NamedTuple):
    """One number over the whole time range."""

    title: str
    description: str
    queries: tuple[Query, ...]
    unit: str = COUNT
    thresholds: Thresholds = PLAIN
    no_value: str = "none"
    decimals: int | None = None
    width: int = 4
    height: int = 4


class Lines(NamedTuple):
    """Series over time."""

    title: str
    description: str
    queries: tuple[Query, ...]
    unit: str = "bytes"
    #: Counts a step: bars on top of each other, instead of lines.
    bars: bool = False
    no_value: str = "no data in this time range"
    #: Whether a series stands for a prefix and its line leads to that.
    drill: bool = False
    maximum: float | None = None
    #: None: as many as it takes, and none of a count.
    decimals: int | None = None
    width: int = 12
    height: int = 9


class Heatmap(NamedTuple):
    """A histogram over time: how many tasks fell into each bucket."""

    title: str
    description: str
    histogram: str
    exemplar: bool = False
    width: int = 12
    height: int = 9


class Column(NamedTuple):
    """One column of a table: a query with one value a row."""

    title: str
    expr: str
    unit: str = COUNT
    thresholds: Thresholds | None = None
    decimals: int | None = None
    width: int | None = None
    #: Texts in place of values, as Grafana has them.
    mappings: tuple[Mapping[str, object], ...] = ()


class Ratio(NamedTuple):
    """A column that Grafana computes: one column by another."""

    title: str
    left: str
    right: str
    thresholds: Thresholds


class Table(NamedTuple):
    """A row for each value of a label."""

    title: str
    description: str
    #: The label, and its column's title.
    by: tuple[str, str]
    columns: tuple[Column, ...]
    #: The first of these that is there sorts the table, largest first.
    sort: tuple[str, ...]
    ratio: Ratio | None = None
    no_value: str = "-"
    width: int = 24
    height: int = 10


Panel = Stat | Lines | Heatmap | Table


class Row(NamedTuple):
    """A titled group of panels."""

    title: str
    panels: tuple[Panel, ...]


class Dashboard(NamedTuple):
    """One dashboard."""

    #: The end of its uid, and its file's name.
    slug: str
    title: str
    description: str
    rows: tuple[Row, ...]
    #: ``many``, ``one`` or ``none``: what the variable for the prefix selects.
    prefix: str = "many"
    #: Whether it compares with the time before.
    baseline: bool = False
    #: The time range, and how often it is asked for again: a day of buckets is work.
    since: str = "now-24h"
    refresh: str = "5m"
