"""What of ours there is once for each of OpenTelemetry's providers, however often it is asked for.

Covers: providers of any kind, an application's own among them.
Does not cover: whose provider is in use (``providers``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

One = TypeVar("One")


class PerProvider(Generic[One]):
    """What there is one of for each provider, for as long as there is that provider.

    By which it is and not by its hash: an application's own may have none.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Any], One]] = {}

    def get(self, provider: Any, make: Callable[[], One]) -> One:
        """Return that of a provider, made where there is none yet.

        Raises
        ------
        TypeError
            The provider cannot be remembered; nothing has been made.
        """
        number = id(provider)
        known = self._known.get(number)
        if known is not None:
            return known[1]
        reference = weakref.ref(provider, lambda _: self._known.pop(number, None))
        made = make()
        self._known[number] = reference, made
        return made

    def all(self) -> list[One]:
        """Return those of all providers. From any thread."""
        return [made for _, made in list(self._known.values())]
