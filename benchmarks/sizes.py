"""What Python objects say of their own size."""

from __future__ import annotations

import sys
from typing import Any

import pandas as pd


def deep_bytes(made: Any) -> int:
    """Return the size of what a benchmark has made, with all that is in it, in bytes."""
    if isinstance(made, pd.DataFrame):
        return int(made.memory_usage(deep=True).sum())
    if isinstance(made, list):
        return sys.getsizeof(made) + sum(deep_bytes(one) for one in made)
    if isinstance(made, dict):
        return sys.getsizeof(made) + sum(sys.getsizeof(one) for one in made.values())
    return sys.getsizeof(made)
