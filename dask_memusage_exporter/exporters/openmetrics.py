"""The text of the page that is ours alone: OpenMetrics with exemplars, or plain without.

Dask's own ``/metrics`` is text 0.0.4 whoever asks, and has no place for exemplars.

Covers: what a client accepts, and both texts of the families that ``prometheus`` builds.
Does not cover: the route (``http``).
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import Metric
from prometheus_client.samples import Exemplar

from dask_memusage_exporter.exporters.prometheus import Renderer

OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
PLAIN = "text/plain; version=0.0.4; charset=utf-8"

#: Suffix of a family's name in the plain text, which has no kind ``info`` either.
_PLAIN_SUFFIX = {"counter": "_total", "info": "_info"}
_PLAIN_KIND = {"info": "gauge"}


def page(renderer: Renderer, accept: str) -> tuple[str, str]:
    """Return a renderer's page and its content type; what fails is left out and counted.

    Parameters
    ----------
    accept
        The request's header ``Accept``.
    """
    families: list[Metric] = []
    for part in (renderer.collect, renderer.collect_health):
        with renderer.health.guard("render"):
            families += part(own_page=True)
    openmetrics = wants_openmetrics(accept)
    return write(families, openmetrics=openmetrics), OPENMETRICS if openmetrics else PLAIN


def wants_openmetrics(accept: str) -> bool:
    """Return whether a client takes OpenMetrics 1.0, and the plain text no more gladly."""
    best = {"application/openmetrics-text": 0.0, "text/plain": 0.0}
    for one in accept.lower().split(","):
        kind, *parameters = (part.strip() for part in one.split(";"))
        about = dict(parameter.partition("=")[::2] for parameter in parameters)
        other = kind.startswith("application/") and not about.get("version", "1.").startswith("1.")
        try:
            weight = float(about.get("q", "1"))
        except ValueError:
            continue
        if kind in best and not other:
            best[kind] = max(best[kind], weight)
    wanted, plain = best.values()
    return wanted > 0 and wanted >= plain


def write(families: Iterable[Metric], *, openmetrics: bool) -> str:
    """Return the text of families.

    What ``prometheus_client`` has for it takes several times as long, and this is on the event
    loop: here nearly all samples are buckets, whose labels are few.
    """
    escaped: dict[str, str] = {}
    lines: list[str] = []
    for family in families:
        name, kind = family.name, family.type
        if not openmetrics:
            name, kind = name + _PLAIN_SUFFIX.get(kind, ""), _PLAIN_KIND.get(kind, kind)
        about = family.documentation.replace("\\", r"\\").replace("\n", r"\n")
        if openmetrics:
            about = about.replace('"', r"\"")
        lines += (f"# HELP {name} {about}", f"# TYPE {name} {kind}")
        for sample in family.samples:
            labels = []
            for label, value in sample.labels.items():
                known = escaped.get(value)
                if known is None:
                    known = escaped[value] = _escape(value)
                labels.append(f'{label}="{known}"')
            shown = f"{{{','.join(labels)}}}" if labels else ""
            line = f"{sample.name}{shown} {float(sample.value)!r}"
            if openmetrics and sample.exemplar is not None:
                line += _exemplar(sample.exemplar)
            lines.append(line)
    lines.append("# EOF\n" if openmetrics else "")
    return "\n".join(lines)


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _exemplar(exemplar: Exemplar) -> str:
    labels = ",".join(f'{name}="{value}"' for name, value in exemplar.labels.items())
    return f" # {{{labels}}} {float(exemplar.value)!r} {exemplar.timestamp!r}"
