"""What a team switches on: dashboards, alerting rules and examples.

:func:`files` gives all of it, filled in, for whoever has only the installed package; the templates
of dashboards are written by ``python -m grafana`` in the repository.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dask_memusage_exporter.monitoring import rules

#: Ways in which our metrics come into the store: scraped, or sent by OpenTelemetry.
FLAVOURS = ("scrape", "otlp")

_HERE = Path(__file__).parent

#: Copied as they are, where metrics are scraped.
_EXAMPLES = ("prometheus.yml", "alertmanager.yml")


def files(
    flavour: str = "scrape",
    namespace: str = "dask",
    thresholds: Mapping[str, object] | None = None,
) -> dict[str, str]:
    """Return every file by its relative path.

    Parameters
    ----------
    flavour
        ``scrape`` or ``otlp``. Rules, their runbooks and the examples beside them are for scraped
        names, so ``otlp`` has none.
    namespace
        Dask's ``distributed.dashboard.prometheus.namespace``; may be empty. OpenTelemetry's names
        have none, so ``otlp`` takes no other than the default.
    thresholds
        Settings of the rules by name, see ``thresholds.yaml``.

    Raises
    ------
    ValueError
        One of them is not allowed; the message says what is.
    """
    if flavour not in FLAVOURS:
        raise ValueError(f"flavour: {flavour!r} is not one of {', '.join(FLAVOURS)}")
    if flavour == "otlp" and thresholds:
        raise ValueError(
            "thresholds are of the alerting rules, which are for scraped names: "
            "leave them out, or use the flavour scrape"
        )
    if flavour == "otlp" and namespace != "dask":
        raise ValueError(
            f"namespace: {namespace!r} is of scraped names, and OpenTelemetry's have none: "
            "leave it out, or use the flavour scrape"
        )
    # Checks the namespace, whatever is made of it.
    alerts = rules.rules(namespace, thresholds)
    made = {
        f"dashboards/{file.name}": rules.fill(file.read_text(), namespace)
        for file in sorted((_HERE / "dashboards" / flavour).glob("*.json"))
    }
    for file in sorted((_HERE / "provisioning").glob("*/*.yaml")):
        made[str(file.relative_to(_HERE))] = file.read_text()
    if flavour == "scrape":
        made["rules/dask-memusage.yaml"] = alerts
        for file in sorted((_HERE / "runbooks").glob("*.md")):
            page = _as_set(file.read_text(), thresholds or {})
            made[f"runbooks/{file.name}"] = rules.fill(page, namespace)
        made.update({name: (_HERE / name).read_text() for name in _EXAMPLES})
    return made


def _as_set(page: str, given: Mapping[str, object]) -> str:
    """Return a runbook with the settings that it names and that are not what it speaks of."""
    known, values = rules.thresholds(), rules.checked(given)
    said = [
        f"`{name}` is `{values[name]}`, not {known[name]['default'] or 'none'}"
        for name in given
        if f"`{name}`" in page and values[name] != str(known[name]["default"])
    ]
    if not said:
        return page
    title, rest = page.split("\n", 1)
    return f"{title}\n\n**Set otherwise than this page says:** {'; '.join(said)}.\n{rest}"
