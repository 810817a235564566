"""Scopes: how often a growth is a task's own, and why not, on three real jobs without jemalloc."""

from __future__ import annotations

import collections
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from distributed import Client

from benchmarks.harness import CSV, bench, isolated, share
from benchmarks.report import Result, Table

#: Workers and threads of each.
SHAPES = ((2, 1), (1, 4))

SETTINGS: dict[str, dict[str, Any]] = {"": {}, "trim": {"memusage.trim": True}}

WORD = re.compile(r"[a-z]+")

#: What is shown of a job: the scope, or the reason why it is shared.
SHOWN = ("process", "overlap", "transfer", "warm_heap", "executor", "mapped", "polling")


def calculate_top_10(path: str) -> list[tuple[str, int]]:
    """Return the ten most frequent words of a text file."""
    words = WORD.findall(Path(path).read_text(errors="replace").lower())
    return collections.Counter(words).most_common(10)


def word_count(small: bool, client: Client, folder: Path) -> None:
    """Count the words of many small texts and a large one: the standard library's sources."""
    sources = sorted(Path(re.__file__).parent.parent.glob("*.py"))[: 10 if small else 200]
    text = "".join(path.read_text(errors="replace") for path in sources)
    large = folder / "large.txt"
    large.write_text((text * (25 * 10**6 // len(text) + 1))[: 10**6 if small else 25 * 10**6])
    paths = [str(path) for path in (large, *sources)]
    client.gather(client.map(calculate_top_10, paths))


def array(small: bool, *_: object) -> None:
    """Standardise the columns of a random array of 512 MB, which is rechunked on the way."""
    import dask.array as da

    side = 1000 if small else 8000
    values = da.random.default_rng(0).normal(size=(side, side), chunks=(side // 8, side // 8))
    columns = values.rechunk((side, side // 16))
    ((columns - columns.mean(axis=0)) / columns.std(axis=0)).max().compute()


def part(number: int, rows: int) -> pd.DataFrame:
    """Return one partition of a table of orders."""
    rng = np.random.default_rng(number)
    return pd.DataFrame(
        {
            "customer": rng.integers(0, rows, rows),
            "price": rng.random(rows),
            "product": rng.choice([f"product {n:03}" for n in range(500)], rows),
        }
    )


def dataframe(small: bool, *_: object) -> None:
    """Group, shuffle and merge a table of twenty partitions, with a column of text."""
    import dask.dataframe as dd

    rows = 5_000 if small else 300_000
    orders = dd.from_map(part, range(4 if small else 20), rows=rows)
    orders.groupby("product")["price"].agg(["mean", "max"]).compute()
    spent = orders.groupby("customer")["price"].sum().to_frame("spent").reset_index()
    merged = orders.merge(spent, on="customer", how="inner")
    merged.groupby("product")["spent"].mean().compute()


JOBS: dict[str, Callable[[bool, Client, Path], None]] = {
    "word count": word_count,
    "array": array,
    "DataFrame": dataframe,
}


def measure(job: str, workers: int, threads: int, config: dict[str, Any], small: bool) -> Any:
    """Run a job; return how many tasks have which scope or reason, of all and of large ones."""
    with (
        tempfile.TemporaryDirectory() as folder,
        bench(CSV, workers=workers, threads=threads, config=config) as it,
    ):
        JOBS[job](small, it.client, Path(folder))
        rows = it.rows()
    counts = collections.Counter(row["reason"] or row["scope"] for row in rows)
    large = [row for row in rows
             if int(row["peak_bytes"]) - int(row["start_bytes"]) >= 10 * 10**6]  # fmt: skip
    return {
        "tasks": len(rows),
        "all": counts,
        "large_tasks": len(large),
        "large": collections.Counter(row["reason"] or row["scope"] for row in large),
        "bounded": sum(bool(row["reusable_bytes"]) for row in rows if row["reason"] == "warm_heap"),
    }


def run(quick: bool) -> Result:
    shapes = SHAPES[:1] if quick else SHAPES
    settings = {"": {}} if quick else SETTINGS
    title = ["job", "workers x threads", "setting", "tasks", *SHOWN]
    every, large = Table([*title, "warm_heap with a bound"], [], "All tasks"), Table(
        title, [], "Tasks during which the process grew by 10 MB or more"
    )  # fmt: skip
    figures: dict[str, Any] = {}
    for job in JOBS:
        for workers, threads in shapes:
            for name, config in settings.items():
                found = isolated(measure, job=job, workers=workers, threads=threads,
                                 config=config, small=quick)  # fmt: skip
                figures[f"{job}/{workers} x {threads}/{name}"] = found
                head = [job, f"{workers} x {threads}", name or "-"]
                total = found["tasks"]
                every.rows.append(
                    [*head, str(total), *(share(found["all"].get(s, 0), total) for s in SHOWN),
                     share(found["bounded"], found["all"].get("warm_heap", 0))]
                )  # fmt: skip
                total = found["large_tasks"]
                large.rows.append(
                    [*head, str(total), *(share(found["large"].get(s, 0), total) for s in SHOWN)]
                )
    return Result(
        "scopes",
        "Scopes: whose number it is, on three real jobs",
        "Without jemalloc. `process`: the growth is the task's own; the other columns are the "
        "reasons why it is `shared`. Word count: each text file is a task, 200 of the standard "
        "library's sources and one of 25 MB. Array: 8000 x 8000 random numbers, rechunked, "
        "standardised. DataFrame: groupby, shuffle and merge of 20 partitions of 300,000 rows "
        "with a column of text. `warm_heap with a bound`: those that say how much was free.",
        [every, large],
        [],
        figures,
    )
