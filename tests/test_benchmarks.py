"""The benchmarks run from end to end at smoke size. Their figures are no test: machines differ."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import BENCHMARKS

ROOT = Path(__file__).parents[1]


@pytest.mark.timeout(600)
def test_every_benchmark_runs_and_its_figures_are_in_json_and_markdown(tmp_path: Path) -> None:
    """A quick run shows all tables, on the screen and in both files, and no row is missing."""
    found, page = tmp_path / "found.json", tmp_path / "found.md"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--json", found, "--markdown", page],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(found.read_text())["results"]
    assert set(results) == set(BENCHMARKS)
    text = page.read_text()
    for result in results.values():
        assert result["title"] in done.stdout
        assert f"## {result['title']}" in text
        assert result["figures"]
        assert result["how"]
        for table in result["tables"]:
            assert table["rows"]
            assert all(len(row) == len(table["columns"]) for row in table["rows"])
    complete = results["completeness"]["figures"]
    ways = [figures for name, figures in complete.items() if name != "tasks"]
    assert ways
    for figures in ways:
        for count in ("rows", "tasks", "peaks", "scopes", "cluster"):
            assert figures[count] == complete["tasks"], (count, figures)
        assert figures["dropped"] == figures["errors"] == 0


def test_an_unknown_benchmark_is_named_and_the_known_ones_with_it() -> None:
    """A name that does not exist is a wrong call: exit status 2 and one line that helps."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "acuracy"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "acuracy" in done.stderr
    assert "accuracy" in done.stderr
    assert "Traceback" not in done.stderr
