"""What a counter gained, by Prometheus' own engine: short lives, new starts and missed scrapes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from grafana import promql

#: Seconds between two scrapes.
EVERY = 15
X = 'x{instance="a"}'

#: What is scraped every 15 s from time 0 on (``_``: nothing, ``stale``: it has gone), at which
#: time it is looked at, how far back, and what it gained.
RANGES = {
    "a cluster that lived for three scrapes": ("_x40 300 400 500 stale _x200", "1h", "1h", 500),
    "one that was scraped once": ("_x40 300 stale _x200", "1h", "1h", 300),
    "one that was there before": ("1000x20 1000+10x200 stale", "50m", "45m", 1790),
    "one that did nothing": ("1000x300", "1h", "30m", 0),
    "one that has gone before": ("1000x40 stale _x400", "1h50m", "30m", None),
    "a scrape that was missed at the start": ("100x118 _x4 100+0x10 130x110", "1h", "30m", 30),
}
STEPS = {
    "a step with tasks": ("0+10x100", "20m", "1m", 40),
    "the first step of a cluster": ("_x40 300 310 310 310", "10m30s", "1m", 310),
    "after ten minutes without a scrape": ("500x40 stale _x38 520x40", "20m30s", "1m", 20),
    "a scheduler that began anew": ("500x40 20 30 30 30 30", "10m30s", "1m", 30),
}


def ask(promtool: str, directory: Path, values: str, at: str, expr: str, expected: object) -> None:
    """Hold what an expression gives at a time against what is expected."""
    test = {
        "evaluation_interval": f"{EVERY}s",
        "tests": [
            {
                "interval": f"{EVERY}s",
                "input_series": [{"series": X, "values": values}],
                "promql_expr_test": [
                    {
                        "expr": f"sum({expr})",
                        "eval_time": at,
                        "exp_samples": []
                        if expected is None
                        else [{"labels": "{}", "value": expected}],
                    }
                ],
            }
        ],
    }
    (directory / "test.json").write_text(json.dumps(test))
    done = subprocess.run(
        [promtool, "test", "rules", "test.json"],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.component("promtool")
@pytest.mark.parametrize("case", RANGES)
def test_in_a_time_range(component: Callable[[str], str], tmp_path: Path, case: str) -> None:
    """Tables and stats count exactly, where ``increase`` loses or invents."""
    values, at, window, expected = RANGES[case]
    expr = promql.in_range(X).replace("$__range", window)
    ask(component("promtool"), tmp_path, values, at, expr, expected)


@pytest.mark.component("promtool")
@pytest.mark.parametrize("case", STEPS)
def test_in_a_step(component: Callable[[str], str], tmp_path: Path, case: str) -> None:
    """Graphs show each task in one step, and nothing that was shown before."""
    values, at, window, expected = STEPS[case]
    ask(component("promtool"), tmp_path, values, at, promql.gained(X, window), expected)


@pytest.mark.component("promtool")
def test_a_new_start_in_a_time_range_is_estimated(
    component: Callable[[str], str], tmp_path: Path
) -> None:
    """Where a counter fell, it is Prometheus' own increase: what was before and what came after."""
    # 0 to 100, anew, 0 to 50: 150, and what increase adds for a step at each end.
    expr = promql.in_range(X).replace("$__range", "1h")
    values = "0x40 0+10x10 0+10x5 50x100"
    ask(component("promtool"), tmp_path, values, "35m", f"({expr} > bool 149) * 150", 150)
    ask(component("promtool"), tmp_path, values, "35m", f"({expr} < bool 155) * 150", 150)
