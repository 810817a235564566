"""Text tables for people: sizes, columns, paths cut to fit. Plain ASCII, 100 columns."""

from __future__ import annotations

from collections.abc import Sequence

from dask_memusage_exporter.cli.summary import Growth

WIDTH = 100

#: What stands where a number is not known.
UNKNOWN = "-"


def size(count: float) -> str:
    """Return bytes with three digits and a unit: ``2.44 MiB``, ``80.4 MiB``, ``350 MiB``."""
    if count < 999.5:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        count /= 1024
        if count < 999.5 or unit == "TiB":
            break
    # 9.995 would be shown with four digits by the first.
    digits = 2 if count < 9.995 else 1 if count < 99.95 else 0
    return f"{count:.{digits}f} {unit}"


def growth(known: Growth) -> str:
    """Return a growth, or what it can be at most, or that it is not known."""
    if known.exact is not None:
        return size(known.exact)
    return UNKNOWN if known.bound is None else f"<= {size(known.bound)}"


def plural(count: int, noun: str) -> str:
    """Return ``1 task`` or ``2 tasks``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def fit(text: str, width: int) -> str:
    """Return a text cut in its middle to a width: names differ at both ends."""
    if len(text) <= width:
        return text
    end = (width - 3) * 2 // 3
    return f"{text[: width - 3 - end]}...{text[-end:]}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """Return the lines of a table.

    Parameters
    ----------
    head
        One a column.
    rows
        Cells as they are shown.
    align
        ``<`` or ``>``, one a column.
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(cells, align, widths, strict=True)
        ).rstrip()
        for cells in (head, *rows)
    ]
