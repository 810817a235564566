"""What a process sends by OpenTelemetry: nothing until variables or an application ask for it.

One object a process that measures and one a scheduler. It finds out whose providers there are,
follows an application that sets its own later, and ends within its time.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from dask_memusage_exporter import providers
from dask_memusage_exporter.config import Settings

if TYPE_CHECKING:
    from dask_memusage_exporter.exporters.otlp import Instruments, Source
    from dask_memusage_exporter.spans import Spans

_NO_TRACES = (
    "memusage.spans.enabled is true, and there is nothing to send spans to; set "
    "OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_EXPORTER or a TracerProvider of your own"
)


class Signal:
    """The provider of one signal, as it is now.

    Parameters
    ----------
    name
        ``traces`` or ``metrics``.
    """

    def __init__(self, name: str, source: Source, identity: Mapping[str, str]) -> None:
        self._name, self._source, self._identity = name, source, identity
        # Spans that have started with ours will end with it; metrics go on where they are.
        self._at_once = name == "metrics"
        self._tried = False
        self._left: list[providers.Pipeline] = []
        #: What is in use; None: nobody wants this signal.
        self.pipeline: providers.Pipeline | None = None

    def refresh(self) -> bool:
        """Look whose provider there is; return whether it is another than before. Cheap."""
        before = self.pipeline
        theirs = providers.application(self._name)
        if theirs is not None:
            if before is None or theirs is not before.provider:
                if before is not None:  # they came after us
                    self._left.append(before)
                    if self._at_once:
                        before.close()
                self.pipeline = providers.Pipeline(theirs, self._source.health)
        elif not self._tried:
            self._tried = True
            self.pipeline = providers.build(self._name, self._source.health, self._identity)
        return self.pipeline is not before

    def close(
        self, end: Callable[[], None] = lambda: None
    ) -> list[tuple[threading.Event, providers.Pipeline]]:
        """Begin to send what is left; return what is set at the end of each pipeline.

        ``end`` is called before, elsewhere.
        """
        all_of_them = self._left if self.pipeline is None else [*self._left, self.pipeline]
        return [(pipeline.close(end), pipeline) for pipeline in all_of_them]


class Telemetry:
    """The signals of one process or scheduler. Runs on its event loop unless said otherwise.

    Parameters
    ----------
    source
        Whose metrics these are; a worker's process has spans too.
    identity
        Attributes of a resource of ours, see :func:`providers.identity`.
    """

    def __init__(self, source: Source, identity: Mapping[str, str], settings: Settings) -> None:
        self._source, self._settings = source, settings
        #: The same for all signals.
        self.instance = identity.get(providers.INSTANCE) or str(uuid.uuid4())
        identity = {**identity, providers.INSTANCE: self.instance}
        self._metrics = Signal("metrics", source, identity)
        self._traces: Signal | None = None
        if source.server == "worker" and settings.spans_enabled is not False:
            self._traces = Signal("traces", source, identity)
        #: Where records are to be recorded; None: nobody wants metrics.
        self.instruments: Instruments | None = None
        #: Where tasks get their spans; None: nobody wants any.
        self.spans: Spans | None = None
        self._all_spans: list[Spans] = []
        self._closed = False
        self.refresh()
        if settings.spans_enabled is True and self._traces is not None and self.spans is None:
            source.health.error("export", providers.ProviderError(_NO_TRACES))

    def refresh(self) -> None:
        """Follow an application that has set providers of its own since. Cheap, never raises."""
        if self._closed:
            return
        try:
            if self._metrics.refresh():
                self._bind_metrics()
        except Exception as error:
            self._source.health.error("export", error)
        try:
            if self._traces is not None and self._traces.refresh():
                self._bind_spans(self._traces.pipeline)
        except Exception as error:
            self._source.health.error("export", error)

    def _bind_metrics(self) -> None:
        from dask_memusage_exporter.exporters import otlp  # imports OpenTelemetry's API

        self.unbind()
        if self._metrics.pipeline is not None:
            buckets = self._settings.buckets
            self.instruments = otlp.instruments(self._metrics.pipeline.provider, buckets)
            self.instruments.add(self._source)

    def _bind_spans(self, pipeline: providers.Pipeline | None) -> None:
        from dask_memusage_exporter.spans import Spans

        if pipeline is not None:
            self.spans = Spans(
                pipeline.provider,
                guest=pipeline.guest,
                settings=self._settings,
                aggregate=self._source.aggregate,
                health=self._source.health,
            )
            self._all_spans.append(self.spans)

    def _end_spans(self) -> None:
        for spans in self._all_spans:
            spans.close()

    def unbind(self) -> None:
        """Observe nothing of ours any more: an application's instruments outlive us."""
        if self.instruments is not None:
            self.instruments.remove(self._source)

    def close(self) -> list[tuple[threading.Event, providers.Pipeline]]:
        """Begin to send what is left and to end, without waiting for it."""
        if self._closed:
            return []
        self._closed = True
        traces = [] if self._traces is None else self._traces.close(self._end_spans)
        return [*self._metrics.close(), *traces]

    async def end(self, timeout: float) -> None:
        """Send what is left and end, within so many seconds, whatever receivers do."""
        until = time.monotonic() + timeout
        ending = self.close()
        while time.monotonic() < until and not all(event.is_set() for event, _ in ending):
            await asyncio.sleep(0.01)
        for spans in self._all_spans:
            spans.give_up()
        for _, pipeline in ending:
            pipeline.give_up()
        self.unbind()
