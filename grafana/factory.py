"""The one factory: a dashboard's data, in one flavour, to Grafana's JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from string import ascii_uppercase
from typing import Any

from grafana_foundation_sdk.builders import dashboard, prometheus
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as model

from grafana import kinds, promql
from grafana.flavours import OTLP, Flavour, NoInstrument, expand
from grafana.kinds import Asked, Link
from grafana.newer import without_what_has_gone
from grafana.panels import PREFIX, Dashboard, Heatmap, Lines, Panel, Query, Stat, Table
from grafana.variables import DATASOURCE, carried, variables

#: Every dashboard, for the links between them: slug and title.
LINKS = (
    ("overview", "Task memory overview"),
    ("prefix", "One task prefix"),
    ("workers", "Workers and deaths"),
    ("exporter", "Exporter health"),
)

#: Where a prefix leads.
_DRILL = "prefix"

#: Grafana's grid.
_GRID = 24


class Factory:
    """Makes one dashboard in one flavour."""

    def __init__(self, what: Dashboard, flavour: Flavour) -> None:
        self._what = what
        self._flavour = flavour
        # Between backticks, where PromQL has no escapes: Grafana's own for it are not right for
        # quotes, and differ by a feature toggle (prometheusSpecialCharsInLabelValues).
        self._prefix = {
            "many": "task_prefix_name=~`${prefix:regex}`",
            "one": "task_prefix_name=`${prefix:raw}`",
            "none": None,
        }[what.prefix]

    def json(self) -> str:
        """Return the dashboard's JSON, ready to be a file."""
        what, flavour = self._what, self._flavour
        made = (
            dashboard.Dashboard(f"Dask / {what.title}{flavour.title}")
            .uid(f"{flavour.uid}-{what.slug}")
            .description(" ".join(what.description.split()))
            .tags(["dask", "dask-memusage"])
            .time(what.since, "now")
            .refresh(what.refresh)
            .timezone(options.TimeZoneBrowser)
            .tooltip(model.DashboardCursorSync.CROSSHAIR)
            .editable()
            .variables(list(variables(what, flavour)))
            .links([self._link(slug, title) for slug, title in LINKS if slug != what.slug])
        )
        for annotation in self._annotations():
            made.annotation(annotation)
        number, down = 1, 0
        for row in what.rows:
            built = [(one, panel) for one in row.panels if (panel := self._panel(one)) is not None]
            if not built:
                continue
            made.with_row(
                dashboard.Row(row.title).id(number).grid_pos(model.GridPos(1, _GRID, 0, down))
            )
            number, down, across, high = number + 1, down + 1, 0, 0
            for one, panel in built:
                if across + one.width > _GRID:
                    across, down, high = 0, down + high, 0
                panel.id(number).grid_pos(model.GridPos(one.height, one.width, across, down))
                made.with_panel(panel)
                number, across, high = number + 1, across + one.width, max(high, one.height)
            down += high
        encoded = json.loads(JSONEncoder().encode(made.build()))
        return json.dumps(without_what_has_gone(encoded), indent=2) + "\n"

    def _link(self, slug: str, title: str) -> dashboard.DashboardLink:
        return (
            dashboard.DashboardLink(title)
            .type(model.DashboardLinkType.LINK)
            .icon("dashboard")
            .tooltip(title)
            # All variables but the prefix: "All" is no prefix, and one is not the overview.
            .url(f"/d/{self._flavour.uid}-{slug}?{carried(self._what, self._flavour)}")
            .include_vars(False)
            .keep_time(True)
        )

    @property
    def _drill(self) -> Link:
        """The link to a prefix's dashboard, with all variables and the time range."""
        chosen = carried(self._what, self._flavour)
        url = f"/d/{self._flavour.uid}-{_DRILL}?{chosen}&${{__url_time_range}}&var-prefix="
        label = self._flavour.label("task_prefix_name")
        sources = (f"__field.labels.{label}", f'__data.fields["{PREFIX[1]}"]')
        # By default Grafana leaves what has a meaning in an address, such as & and +.
        return Link(
            *(
                [{"title": "This task prefix", "url": f"{url}${{{one}:percentencode}}"}]
                for one in sources
            )
        )

    def _annotations(self) -> Iterator[dashboard.AnnotationQuery]:
        killed = promql.by_prefix("sum", promql.gained("<task_memory_killed_tasks_total>"))
        yield (
            dashboard.AnnotationQuery()
            .name("Tasks that were killed")
            .datasource(DATASOURCE)
            .enable(True)
            .icon_color("red")
            .expr(expand(f"{killed} > 0", self._flavour, self._prefix))
        )

    def _panel(self, one: Panel) -> Any:
        """Return a panel's builder; None where this flavour has not its series."""
        if self._flavour is OTLP:
            # All of a task's are workers' there, and they are not scraped.
            one = one._replace(
                title=one.title.replace(" (worker series)", ""),
                description=re.sub(r"\s+Empty:.*", "", one.description, flags=re.DOTALL),
            )
        if isinstance(one, Heatmap):
            spread = promql.spread(one.histogram)
            asked = self._queries([Query(spread, "{{le}}", one.exemplar)])
        elif isinstance(one, Table):
            asked = self._queries([Query(column.expr) for column in one.columns])
        else:
            asked = self._queries(one.queries)
        if not asked:
            return None
        if isinstance(one, Stat):
            return kinds.stat(one, asked)
        if isinstance(one, Lines):
            return kinds.lines(one, asked, self._drill if one.drill else None)
        if isinstance(one, Heatmap):
            return kinds.heatmap(one, asked[0])
        link = one.by == PREFIX and self._what.slug != _DRILL
        return kinds.table(
            one, asked, self._flavour.label(one.by[0]), self._drill if link else None
        )

    def _queries(self, queries: Sequence[Query]) -> list[Asked]:
        """Return those queries that this flavour can answer, lettered as Grafana does."""
        built = []
        for letter, query in zip(ascii_uppercase, queries, strict=False):
            try:
                expr = expand(query.expr, self._flavour, self._prefix)
            except NoInstrument:
                continue
            target = prometheus.Dataquery().expr(expr).ref_id(letter).datasource(DATASOURCE)
            target.legend_format(self._flavour.rename(query.legend)).exemplar(query.exemplar)
            built.append(Asked(query, letter, target))
        return built
