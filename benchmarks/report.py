"""Results and how they are shown: as text, as JSON, as Markdown."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

#: Whose versions are told.
PACKAGES = (
    "dask", "distributed", "dask-memusage-exporter", "dask-memusage", "numpy", "pandas",
    "pyarrow", "prometheus-client", "psutil", "opentelemetry-sdk",
)  # fmt: skip

INTRODUCTION = (
    'Made by `make bench BENCH_ARGS="--markdown FILE"` in one run, beside no exporter and '
    "dask-memusage 1.1. Every measurement has a fresh cluster, whose workers are processes, in a "
    "fresh interpreter. Figures that compare were taken in turns and paired by round: median "
    "(lowest to highest)."
)


@dataclass
class Table:
    """A table; cells are shown as they are."""

    columns: list[str]
    rows: list[list[str]]
    caption: str = ""


@dataclass
class Target:
    """What the project has set itself, and whether it is reached."""

    what: str
    wanted: str
    got: str
    reached: bool


@dataclass
class Result:
    """What one benchmark has found."""

    name: str
    title: str
    #: How it was measured: a sentence or two.
    how: str
    tables: list[Table]
    targets: list[Target] = field(default_factory=list)
    #: All figures by name, for programs.
    figures: dict[str, Any] = field(default_factory=dict)


def machine() -> dict[str, str]:
    """Return what is to be known of this machine and its software."""
    facts = {
        "CPUs": f"{len(os.sched_getaffinity(0))} ({_cpu_model()})",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "C library": " ".join(platform.libc_ver()),
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
    }
    return facts | {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def text(result: Result) -> str:
    """Return a result for a terminal."""
    parts = [f"== {result.title} ==", result.how]
    for table in result.tables:
        parts += ["", table.caption] if table.caption else [""]
        parts += _lines(table, "  ", "  ", "  ")
    parts += [
        "",
        *(f"{_verdict(t)}: {t.what}: {t.got} (wanted: {t.wanted})" for t in result.targets),
    ]
    return "\n".join(parts) + "\n"


def markdown(results: Sequence[Result], facts: dict[str, str], *, quick: bool) -> str:
    """Return all results as a Markdown document."""
    parts = ["# Benchmarks", ""]
    if quick:
        parts += ["A quick run: the figures show that everything runs, and nothing else.", ""]
    parts += [
        INTRODUCTION,
        "",
        *_lines(Table(["machine", ""], [[k, v] for k, v in facts.items()]), "| ", " | ", " |"),
    ]
    goals = [t for result in results for t in result.targets]
    if goals:
        rows = [[t.what, t.wanted, t.got, _verdict(t)] for t in goals]
        parts += ["", "## Targets", ""]
        parts += _lines(Table(["what", "wanted", "measured", ""], rows), "| ", " | ", " |")
    for result in results:
        parts += ["", f"## {result.title}", "", result.how]
        for table in result.tables:
            parts += ["", f"**{table.caption}**", ""] if table.caption else [""]
            parts += _lines(table, "| ", " | ", " |")
    return "\n".join(parts) + "\n"


def document(results: Sequence[Result], facts: dict[str, str], *, quick: bool) -> dict[str, Any]:
    """Return all results as plain data for JSON."""
    return {
        "quick": quick,
        "command": sys.argv[1:],
        "machine": facts,
        "results": {result.name: asdict(result) for result in results},
    }


def _verdict(target: Target) -> str:
    return "reached" if target.reached else "MISSED"


def _lines(table: Table, left: str, between: str, right: str) -> list[str]:
    """Return the lines of a table, padded, with a rule under the head."""
    cells = [table.columns, *table.rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(table.columns))]
    lines = [
        (left + between.join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + right).rstrip()
        for row in cells
    ]
    rule = left + between.join("-" * max(w, 3) for w in widths) + right
    return [lines[0], rule.rstrip(), *lines[1:]]
