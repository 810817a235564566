"""``python -m grafana`` and ``make dashboards``: write all that is generated."""

from __future__ import annotations

import sys

from grafana.output import ROOT, generated

if __name__ == "__main__":
    for path, text in generated().items():
        file = ROOT / path
        if not file.exists() or file.read_text() != text:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            sys.stderr.write(f"{path}\n")
