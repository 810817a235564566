"""Everything that is generated: the package's templates, and what is ready to import."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from dask_memusage_exporter.monitoring import rules
from grafana import exporter, overview, prefix, workers
from grafana.factory import Factory
from grafana.flavours import FLAVOURS, NAMESPACE
from grafana.panels import Dashboard

ROOT = Path(__file__).parent.parent
PACKAGE = "dask_memusage_exporter/monitoring"
CHART = "deploy/helm/dask-memusage-exporter"

DASHBOARDS: tuple[Dashboard, ...] = (
    overview.DASHBOARD,
    prefix.DASHBOARD,
    workers.DASHBOARD,
    exporter.DASHBOARD,
)


def templates() -> Iterator[tuple[str, str]]:
    """Return the dashboards as the package has them, by their path below ``monitoring/``."""
    for flavour in FLAVOURS:
        for one in DASHBOARDS:
            path = f"dashboards/{flavour.name}/{one.slug}.json"
            yield path, Factory(one, flavour).json()


def runbooks(root: Path = ROOT) -> Iterator[tuple[str, str]]:
    """Return the pages of ``docs/runbooks`` as the package has them, for who has not the docs."""
    for page in sorted((root / "docs" / "runbooks").glob("*.md")):
        text = re.sub(r"\bdask_(scheduler|worker)_", rf"{NAMESPACE}_\1_", page.read_text())
        # What is beside them in the docs is not beside them there.
        text = re.sub(r"\[([^]]+)\]\(\.\./([^)#]+)[^)]*\)", r"\1 (`docs/\2`)", text)
        yield f"runbooks/{page.name}", text


def generated(root: Path = ROOT) -> dict[str, str]:
    """Return every generated file of the repository, by its path below the root.

    What is ready to import is the templates as the package fills them in by default. The chart's
    copies are the templates' own bytes: it fills them in with its values.
    """
    boards = dict(templates())
    made = {f"{PACKAGE}/{path}": text for path, text in (*boards.items(), *runbooks(root))}
    for path, text in boards.items():
        _, flavour, name = path.split("/")
        folder = "grafana/dashboards" if flavour == "scrape" else f"grafana/{flavour}"
        made[f"{folder}/{name}"] = rules.fill(text, "dask")
    made["grafana/rules/dask-memusage.yaml"] = rules.rules("dask")
    if (root / CHART).is_dir():
        for path, text in boards.items():
            made[f"{CHART}/files/{path}"] = text
        for name in ("rules.yaml", "thresholds.yaml"):
            made[f"{CHART}/files/{name}"] = (root / PACKAGE / name).read_text()
    return made
