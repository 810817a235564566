"""Kinds of allocation: 200 MB as one array, as blocks, as Python objects, as a DataFrame.

Large blocks come from the kernel and go back to it. Small ones come from a heap that keeps them:
a second task reuses what the first one left, and resident memory does not move. The truth of a
kind is what a fresh process without Dask needs for it, whose heap has nothing to reuse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.harness import CSV, OLD, bench, isolated, task_bytes
from benchmarks.report import Result, Table, Target
from benchmarks.sizes import deep_bytes

TOTAL_BYTES = 200 * 10**6
RUNS = 10

#: Of what a task needs: within this share a size counts as right.
CLOSE = 0.10


def blocks(size: int) -> list[bytearray]:
    return [bytearray(size) for _ in range(TOTAL_BYTES // size)]


def texts(count: int) -> list[str]:
    return [f"{number:0151d}" for number in range(count)]


KINDS: dict[str, Callable[[], Any]] = {
    "one large array": lambda: np.ones(TOTAL_BYTES, dtype=np.uint8),
    "1 MB blocks": lambda: blocks(10**6),
    "64 kB blocks": lambda: blocks(64 * 10**3),
    "5 kB blocks": lambda: blocks(5 * 10**3),
    "strings": lambda: texts(TOTAL_BYTES // 208),
    "dicts": lambda: [{"a": n, "b": -n} for n in range(TOTAL_BYTES // 248)],
    "DataFrame, numbers": lambda: pd.DataFrame(
        {f"c{n}": np.arange(TOTAL_BYTES // 80) * float(n) for n in range(10)}
    ),
    "DataFrame, object": lambda: pd.DataFrame(
        {"text": pd.Series(texts(TOTAL_BYTES // 208), dtype=object)}
    ),
    "DataFrame, str": lambda: pd.concat(
        [pd.DataFrame({"text": texts(10_000)}, dtype="str") for _ in range(125)]
    ),
}

#: What is measured: column title, variant, Dask configuration.
ASKED = {
    "ours": (CSV, {}),
    "ours, trim": (CSV, {"memusage.trim": True}),
    OLD: (OLD, {}),
}


def make(_: int, kind: str) -> None:
    """Make 200 MB of a kind and let them go: one task."""
    KINDS[kind]()


def prepare() -> None:
    """Do nothing: importing this module has imported NumPy and pandas."""
    pd.concat([pd.DataFrame({"text": ["a"]}, dtype="str")] * 2)  # it imports more when first used


def truth(kind: str) -> dict[str, int]:
    """Return what a kind needs in this fresh process, at its peak, and what its objects' sizes say.

    The kernel's high-water mark, reset before; what is needed only while it is made counts.
    """
    prepare()
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    before = _status("VmRSS")
    made = KINDS[kind]()
    return {"peak": _status("VmHWM") - before, "sizes": deep_bytes(made)}


def _status(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024


def measure(kind: str, variant: str, config: dict[str, Any], runs: int) -> dict[str, Any]:
    """Run a kind several times on the one thread of a fresh worker; return all rows."""
    with bench(variant, config=config) as it:
        it.client.run(prepare)
        for run in range(runs):
            it.client.submit(make, run, kind, key=f"make-{run}").result()
        seconds = it.metric("dask_worker_task_memory_overhead_seconds_total", stage="start")
        return {"rows": it.rows(), "start_seconds": seconds}


def judge(row: dict[str, str], need: int) -> str:
    """Return what is to be thought of a row: ``right``, ``covered``, ``silent`` or ``wrong``.

    ``silent``: no growth is claimed, and nothing is said of what the heap hides.
    """
    if row["growth_bytes"]:
        return "right" if abs(int(row["growth_bytes"]) - need) <= CLOSE * need else "wrong"
    if row["reason"] != "warm_heap" or not row["reusable_bytes"]:
        return "silent"
    seen = int(row["peak_bytes"]) - int(row["start_bytes"])
    return "covered" if seen + int(row["reusable_bytes"]) >= (1 - CLOSE) * need else "wrong"


def cell(row: dict[str, str]) -> str:
    """Return what a row says, for the table."""
    size = task_bytes(row)
    if size is not None:
        return f"{size / 1e6:.0f} MB"
    free = row["reusable_bytes"]
    return f"{row['reason']}, {int(free) / 1e6:.0f} MB free" if free else f"{row['reason']}"


def run(quick: bool) -> Result:
    kinds = ["5 kB blocks"] if quick else list(KINDS)
    asked = ["ours"] if quick else list(ASKED)
    runs = 3 if quick else RUNS
    sizes = Table(["kind", "needs", "sum of sizes", *(f"{a}: {n}" for a in asked for n in
                  ("first", "last"))], [])  # fmt: skip
    judged = Table(["kind", "variant", "scope process", "within 10 %", "covered", "silent", "wrong",
                    "before a task"], [])  # fmt: skip
    figures: dict[str, Any] = {}
    wrong: dict[str, int] = {}
    for kind in kinds:
        need = isolated(truth, kind=kind)
        line = [kind, f"{need['peak'] / 1e6:.0f} MB", f"{need['sizes'] / 1e6:.0f} MB"]
        figures[kind] = {"needs": need}
        for name in asked:
            variant, config = ASKED[name]
            found = isolated(measure, kind=kind, variant=variant, config=config, runs=runs)
            rows = found["rows"]
            line += [cell(rows[0]), cell(rows[-1])]
            figures[kind][name] = {"rows": rows, "start_seconds": found["start_seconds"]}
            if variant == OLD:
                near = sum(
                    abs((task_bytes(row) or 0) - need["peak"]) <= CLOSE * need["peak"]
                    for row in rows
                )
                judged.rows.append(
                    [kind, name, "-", f"{near}", "-", "-", f"{len(rows) - near}", "-"]
                )
                continue
            verdicts = [judge(row, need["peak"]) for row in rows]
            counts = {v: verdicts.count(v) for v in ("right", "covered", "silent", "wrong")}
            figures[kind][name]["verdicts"] = counts
            wrong[name] = wrong.get(name, 0) + counts["wrong"]
            own = sum(row["scope"] == "process" for row in rows)
            judged.rows.append(
                [kind, name, f"{own}", *(str(count) for count in counts.values()),
                 f"{found['start_seconds'] / len(rows) * 1e3:.2f} ms"]
            )  # fmt: skip
        sizes.rows.append(line)
    return Result(
        "kinds",
        "Kinds of allocation: 200 MB each, first and later runs",
        f"Each kind is made and let go {runs} times, one after the other, on the one thread of a "
        "fresh worker with pandas imported. `needs` is the truth: by how much the peak of a fresh "
        "process without Dask rises for it (temporary memory included); `sum of sizes` is what "
        "its objects say of themselves (sys.getsizeof, memory_usage). Ours says a size only where "
        "the scope is `process`; else it gives the reason and `reusable_bytes`. `covered`: "
        "`warm_heap`, and what was seen to grow plus `reusable_bytes` is at least 90 % of the "
        "truth. `silent`: no growth claimed and no bound given (the heap was not asked, or the "
        "reason is another). `before a task`: our time on its thread, asking and trimming, mean. "
        "`trim`: `memusage.trim: true`, 5 % of the time. dask-memusage says maximum less minimum.",
        [sizes, judged],
        [
            Target(f"kinds of allocation, rows that are wrong ({name})", "0",
                   f"{count} of {runs * len(kinds)}", count == 0)
            for name, count in wrong.items()
        ],
        figures,
    )  # fmt: skip
