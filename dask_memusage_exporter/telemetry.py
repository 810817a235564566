"""What a process sends by OpenTelemetry: nothing until variables or an application ask for it.

One object a process that measures and one a scheduler. It finds out whose providers there are,
follows an application that sets its own later, and ends within its time.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dask_memusage_exporter import providers

if TYPE_CHECKING:
    from dask_memusage_exporter.exporters.otlp import Instruments, Source


class Signal:
    """The provider of one signal, as it is now.

    Parameters
    ----------
    name
        ``traces`` or ``metrics``.
    """

    def __init__(self, name: str, source: Source, identity: Mapping[str, str]) -> None:
        self._name, self._source, self._identity = name, source, identity
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
                    before.close()
                    self._left.append(before)
                self.pipeline = providers.Pipeline(theirs, self._source.health)
        elif not self._tried:
            self._tried = True
            self.pipeline = providers.build(self._name, self._source.health, self._identity)
        return self.pipeline is not before

    def close(self) -> list[tuple[threading.Event, providers.Pipeline]]:
        """Begin to send what is left; return what is set at the end of each pipeline."""
        used = self._left if self.pipeline is None else [*self._left, self.pipeline]
        return [(pipeline.close(), pipeline) for pipeline in used]


class Telemetry:
    """The signals of one process or scheduler. Runs on its event loop unless said otherwise.

    Parameters
    ----------
    identity
        Attributes of a resource of ours, see :func:`providers.identity`.
    buckets
        Upper bounds of histograms in bytes.
    """

    def __init__(
        self, source: Source, identity: Mapping[str, str], buckets: Sequence[float]
    ) -> None:
        self._source, self._buckets = source, buckets
        self._metrics = Signal("metrics", source, identity)
        #: Where records are to be recorded; None: nobody wants metrics.
        self.instruments: Instruments | None = None
        self._closed = False
        self.refresh()

    def refresh(self) -> None:
        """Follow an application that has set providers of its own since. Cheap, never raises."""
        if self._closed:
            return
        try:
            if self._metrics.refresh():
                self._bind_metrics()
        except Exception as error:
            self._source.health.error("export", error)

    def _bind_metrics(self) -> None:
        from dask_memusage_exporter.exporters import otlp  # imports OpenTelemetry's API

        self._unbind()
        if self._metrics.pipeline is not None:
            self.instruments = otlp.instruments(self._metrics.pipeline.provider, self._buckets)
            self.instruments.sources.append(self._source)

    def _unbind(self) -> None:
        if self.instruments is not None and self._source in self.instruments.sources:
            self.instruments.sources.remove(self._source)

    def close(self) -> list[tuple[threading.Event, providers.Pipeline]]:
        """Begin to send what is left and to end, without waiting for it."""
        if self._closed:
            return []
        self._closed = True
        return self._metrics.close()

    async def end(self, timeout: float) -> None:
        """Send what is left and end, within so many seconds, whatever receivers do."""
        until = time.monotonic() + timeout
        ending = self.close()
        while time.monotonic() < until and not all(event.is_set() for event, _ in ending):
            await asyncio.sleep(0.01)
        for _, pipeline in ending:
            pipeline.give_up()
        self._unbind()
