"""``make pictures``: a real run, and ``docs/pictures/`` drawn of it."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import click

from grafana.output import ROOT
from grafana.pictures import draw
from grafana.pictures.run import Run, scraped

#: The prefix that the dashboard of one shows: it needs more from round to round.
_SHOWN = {"prefix": "train"}


def _caption(run: Run) -> str:
    pinned = json.loads((draw.HERE / "package.json").read_text())["dependencies"]
    libraries = " and ".join(f"{one} {pinned[f'@grafana/{one}']}" for one in ("scenes", "ui"))
    minutes = (run.end - run.began) / 60
    return (
        f"Drawn by Grafana's own libraries ({libraries}) from a real run of {minutes:.0f} minutes, "
        "the first third of it as the baseline. Not a Grafana server's screen: it has no marks of "
        "annotations, and the cells of heatmaps are drawn by us."
    )


def _iso(second: float) -> str:
    return datetime.fromtimestamp(second, timezone.utc).isoformat(timespec="milliseconds")


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        sys.exit(f"grafana.pictures: {name} is not installed: as root, apt-get install {name}")
    return found


@click.command()
@click.option("--minutes", default=10.0, show_default=True, help="How long the job runs.")
def main(minutes: float) -> None:
    """Draw every dashboard from a run of this length."""
    prometheus, chromium = (_program(name) for name in ("prometheus", "chromium"))
    pictures = ROOT / "docs" / "pictures"
    pictures.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as directory,
        scraped(prometheus, Path(directory), minutes * 60) as run,
        draw.served() as url,
        draw.browser(chromium) as page,
    ):
        for file in sorted((ROOT / "grafana" / "dashboards").glob("*.json")):
            asked = {
                "dashboard": json.loads(file.read_text()),
                "prometheus": run.url,
                "from": _iso(run.start),
                "to": _iso(run.end),
                "chosen": _SHOWN if file.stem == "prefix" else {},
                "caption": _caption(run),
            }
            picture = pictures / f"{file.stem}.png"
            draw.picture(page, url, picture, asked)
            sys.stderr.write(f"{picture.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
