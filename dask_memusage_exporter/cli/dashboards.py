"""`dask memusage dashboards`: dashboards, rules and what starts them, without the repository."""

from __future__ import annotations

from pathlib import Path

import click

from dask_memusage_exporter import monitoring
from dask_memusage_exporter.cli.command import InputError, Verb, say
from dask_memusage_exporter.cli.tables import plural


@click.command(cls=Verb, short_help="Write dashboards, alerting rules and runbooks.")
@click.option(
    "--out", "directory", metavar="DIR", required=True, help="Write here; made if it is not there."
)
@click.option(
    "--namespace",
    metavar="NAME",
    default="dask",
    show_default=True,
    help="What scraped names begin with: Dask's distributed.dashboard.prometheus.namespace.",
)
@click.option(
    "--flavour",
    type=click.Choice(monitoring.FLAVOURS),
    default="scrape",
    show_default=True,
    help="Names as Prometheus scrapes them, or as OpenTelemetry's protocol brings them.",
)
@click.option(
    "--threshold",
    "thresholds",
    metavar="NAME=VALUE",
    multiple=True,
    help="A setting of the alerting rules, such as near-limit-percent=80; may be repeated.",
)
@click.option("--force", is_flag=True, help="Overwrite files that are there and differ.")
def dashboards(
    *, directory: str, namespace: str, flavour: str, thresholds: tuple[str, ...], force: bool
) -> None:
    """Write Grafana dashboards, alerting rules, runbooks, provisioning and configuration examples.

    dashboards/*.json are to be imported into Grafana, or provisioned by what is in provisioning/;
    rules/ is for Prometheus' rule_files, runbooks/ for wherever --threshold runbook-base=ADDRESS
    leads; prometheus.yml and alertmanager.yml are examples to start from.

    Nothing is written where a file that is there would change, but with --force.
    """
    try:
        made = monitoring.files(flavour, namespace, _settings(thresholds))
    except ValueError as error:
        raise InputError(str(error)) from None
    out = Path(directory)
    try:
        changed = [name for name, text in made.items() if _differs(out / name, text)]
        if changed and not force:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise InputError(
                f"will not overwrite {out / changed[0]}{more}: what is there differs; "
                "give --force, or another --out"
            )
        for name, text in made.items():
            file = out / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"cannot write {error.filename or directory}: {error.strerror}; choose another --out"
        ) from None
    # Only then: whoever reads this may stop to, as `| head` does.
    say("\n".join(str(out / name) for name in made))
    click.echo(f"{plural(len(made), 'file')}; --help tells where each goes.", err=True)


def _settings(given: tuple[str, ...]) -> dict[str, str]:
    """Return the settings that are given, by name; the last of each stands.

    Raises
    ------
    ValueError
        One is no setting.
    """
    settings = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals:
            raise ValueError(
                f"--threshold {one!r} is not NAME=VALUE, such as near-limit-percent=80"
            )
        settings[name.strip()] = value
    return settings


def _differs(file: Path, text: str) -> bool:
    """Whether something else is there already."""
    if not file.exists():
        return False
    try:
        return file.read_text(encoding="utf-8") != text
    except UnicodeDecodeError:
        return True
