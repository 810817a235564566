"""`dask memusage dashboards`, as a process: what it writes, and what it says to a wrong call."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.conftest import run_cli

VERB = ("memusage", "dashboards")

WRITTEN = {
    *(f"dashboards/{name}.json" for name in ("overview", "prefix", "workers", "exporter")),
    "provisioning/dashboards/dask-memusage.yaml",
    "provisioning/datasources/dask-memusage.yaml",
}
EXAMPLES = {
    "rules/dask-memusage.yaml",
    "prometheus.yml",
    "alertmanager.yml",
    *(f"runbooks/{page.name}" for page in Path(__file__).parent.parent.glob("docs/runbooks/*.md")),
}


def written(directory: Path) -> set[str]:
    return {str(file.relative_to(directory)) for file in directory.glob("**/*") if file.is_file()}


def refused(*arguments: str) -> str:
    """Return the one line with which a call is refused."""
    done = run_cli(*VERB, *arguments)
    assert done.returncode == 2, done.stdout
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_it_writes_all_that_a_team_needs(tmp_path: Path) -> None:
    """Dashboards, rules, provisioning and examples, by name; the names follow the namespace."""
    out = tmp_path / "new" / "monitoring"
    done = run_cli(*VERB, "--out", str(out), "--namespace", "acme")
    assert done.returncode == 0, done.stderr
    assert written(out) == WRITTEN | EXAMPLES
    assert {str(Path(line).relative_to(out)) for line in done.stdout.splitlines()} == written(out)
    assert "21 files; --help tells" in done.stderr
    text = (out / "dashboards" / "overview.json").read_text()
    assert json.loads(text)["uid"] == "dask-memusage-overview"
    assert "acme_scheduler_task_memory_peak_bytes_bucket{" in text
    rules = (out / "rules" / "dask-memusage.yaml").read_text()
    assert "acme_scheduler_" in rules
    # Of each alert there is the page, with queries that can be pasted, and no link to nowhere.
    for alert in re.findall(r"- alert: (\w+)", rules):
        runbook = (out / "runbooks" / f"{alert}.md").read_text()
        assert "acme_scheduler_" in runbook
        assert not re.search(r"\bdask_(scheduler|worker)_", runbook)
        for link in re.findall(r"\]\(([^)]+)\)", runbook):
            assert (out / "runbooks" / link).exists(), link


@pytest.mark.component("promtool")
def test_the_files_fit_together(tmp_path: Path, component: Callable[[str], str]) -> None:
    """Provisioning asks the environment for what it cannot know; promtool accepts the rest."""
    assert run_cli(*VERB, "--out", str(tmp_path)).returncode == 0
    (source,) = yaml.safe_load(
        (tmp_path / "provisioning/datasources/dask-memusage.yaml").read_text()
    )["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "${PROMETHEUS_URL}")
    assert "uid" not in source
    assert not source["isDefault"]
    (provider,) = yaml.safe_load(
        (tmp_path / "provisioning/dashboards/dask-memusage.yaml").read_text()
    )["providers"]
    assert provider["options"]["path"] == "${DASK_MEMUSAGE_DASHBOARDS}"
    # The example of Prometheus' configuration finds the rules where they were written.
    checked = subprocess.run(
        [component("promtool"), "check", "config", "prometheus.yml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "rules found" in checked.stdout


def test_thresholds_are_put_into_the_rules(tmp_path: Path) -> None:
    """Each that is given, the others at their defaults; the alert's page does not say otherwise."""
    done = run_cli(*VERB, "--out", str(tmp_path), "--threshold", "near-limit-percent=77")
    assert done.returncode == 0, done.stderr
    rules = (tmp_path / "rules" / "dask-memusage.yaml").read_text()
    assert "77" in rules
    assert yaml.safe_load(rules)["groups"]
    said = "**Set otherwise than this page says:** `near-limit-percent` is `77`, not 90.\n\n## "
    pages = {page.stem: page.read_text() for page in (tmp_path / "runbooks").glob("*.md")}
    assert [name for name, text in pages.items() if "Set otherwise" in text] == [
        "DaskTaskMemoryNearWorkerLimit"
    ]
    assert said in pages["DaskTaskMemoryNearWorkerLimit"]


def test_all_is_written_though_nobody_reads_the_names(tmp_path: Path) -> None:
    """As with `| head`: the files are there, and nothing says that they cannot be written."""
    command = [sys.executable, "-m", "dask", *VERB, "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert b"cannot write" not in process.stderr.read()
    assert written(tmp_path) == WRITTEN | EXAMPLES


def test_the_flavour_for_otlp(tmp_path: Path) -> None:
    """It has its own dashboards, and no rules or examples for what is scraped."""
    done = run_cli(*VERB, "--out", str(tmp_path), "--flavour", "otlp")
    assert done.returncode == 0, done.stderr
    assert written(tmp_path) == WRITTEN
    overview = json.loads((tmp_path / "dashboards" / "overview.json").read_text())
    assert overview["uid"] == "dask-memusage-otlp-overview"


def test_what_others_wrote_is_not_overwritten(tmp_path: Path) -> None:
    """A file that differs stops all, before anything is written; --force does not ask."""
    theirs = tmp_path / "prometheus.yml"
    theirs.write_bytes(b"\xff mine")
    message = refused("--out", str(tmp_path))
    assert f"will not overwrite {theirs}: what is there differs; give --force" in message
    assert written(tmp_path) == {"prometheus.yml"}
    assert run_cli(*VERB, "--out", str(tmp_path), "--force").returncode == 0
    assert written(tmp_path) == WRITTEN | EXAMPLES
    assert theirs.read_text().startswith("# A scrape configuration")
    # Once more: all is there and the same.
    assert run_cli(*VERB, "--out", str(tmp_path)).returncode == 0
    assert "and 16 more" in refused("--out", str(tmp_path), "--namespace", "acme")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--namespace", "a-b"), "namespace: 'a-b' cannot begin a metric's name"),
        (("--flavour", "other"), "'other' is not one of 'scrape', 'otlp'"),
        (("--threshold", "near-limit-percent"), "is not NAME=VALUE, such as near-limit"),
        (("--threshold", "near-limit-percent=200"), "percent from 1 to 100"),
        (("--threshold", "near-limit=80"), "did you mean near-limit-percent?"),
        (("--flavour", "otlp", "--threshold", "errors=3"), "leave them out, or use the flavour"),
        (("--flavour", "otlp", "--namespace", "acme"), "OpenTelemetry's have none: leave it out"),
    ],
)
def test_a_wrong_call_is_told_the_mend(
    tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    """In one line, with exit status 2 and nothing written."""
    assert says in refused("--out", str(tmp_path / "out"), *arguments)
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    """A file where a directory should be, or no place at all, is said so."""
    (tmp_path / "file").touch()
    assert "choose another --out" in refused("--out", str(tmp_path / "file"))
    assert "Missing option '--out'" in refused()
