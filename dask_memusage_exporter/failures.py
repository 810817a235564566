"""What a task raised, told as OpenTelemetry's semantic conventions say.

By a log record of the span's where an application has set where those go, else by a span event.

Covers: exceptions as distributed has them, pickled or not; both ways, or the two at once by opt-in.
Does not cover: log records of ours without an application's LoggerProvider.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from distributed.protocol import pickle
from opentelemetry.context import Context
from opentelemetry.trace import set_span_in_context

from dask_memusage_exporter import __version__, providers
from dask_memusage_exporter.aggregate import to_text

SCOPE_NAME = "dask_memusage_exporter"

#: Whether an exception is told by a span event beside the log record, as the semantic conventions
#: name it; the log record alone is what they want.
_OPT_IN = "OTEL_SEMCONV_EXCEPTION_SIGNAL_OPT_IN"


class Failure(NamedTuple):
    """What a task raised, as it is at hand: to unpickle it may take time and run others' code."""

    #: The exception, or its pickle.
    error: Any
    #: Its ``repr``, and its traceback; empty where they are not known.
    text: str
    traceback: str

    def told(self) -> tuple[str, str]:
        """Return the exception's type, as the semantic conventions name it, and its message."""
        try:
            error, message = self.error, self.text
            if isinstance(error, (bytes, bytearray, memoryview)):
                error = pickle.loads(error)
            if isinstance(error, BaseException):
                kind, message = type(error), str(error)
                module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
                return to_text(module + kind.__qualname__), to_text(message)
        except BaseException:  # whatever a user's class does: this thread must live
            message = self.text
        return to_text(message.partition("(")[0]) or "_OTHER", to_text(message)


def tell(span: Any, kind: str, message: str, traceback: str, when: int) -> None:
    """Tell an exception: by a log record where there is somebody for it, else by a span event."""
    about = {"exception.type": kind, "exception.message": message}
    if traceback:
        about["exception.stacktrace"] = to_text(traceback)
    try:
        logged = _log(span, about, when)
    except Exception:  # an application's own: the span itself is not lost
        logged = False
    if not logged or "logs/dup" in os.environ.get(_OPT_IN, ""):
        span.add_event("exception", about, when)


def _log(span: Any, about: Mapping[str, str], when: int) -> bool:
    """Tell an exception by a log record; return whether an application has set where to."""
    if "opentelemetry._logs" not in sys.modules:  # whoever sets one has imported it
        return False
    from opentelemetry import _logs

    provider = _logs.get_logger_provider()
    if "NoOp" in type(provider).__name__ or not providers.reaches(provider):
        return False
    try:
        record: Any = _logs.LogRecord(
            timestamp=when,
            context=set_span_in_context(span, Context()),
            severity_text="ERROR",
            severity_number=_logs.SeverityNumber.ERROR,
            attributes=about,
            event_name="exception",
        )
    except TypeError:  # an SDK from before records had a context
        return False
    provider.get_logger(SCOPE_NAME, __version__).emit(record)
    return True
