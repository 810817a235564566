"""A browser without a window, and the page that draws a dashboard in it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).parent
#: A laptop's window; it is as high as the dashboard.
WIDTH = 1500
_PAGE = """<!doctype html><meta charset="utf-8"><title>A dashboard</title>
<link rel="stylesheet" href="/build/main.css"><body><div id="root"></div>
<script>window.__grafana_public_path__ = "/public/"</script><script src="/build/main.js"></script>
"""

#: What a Grafana server has under these paths.
_PUBLIC = {
    "/public/build/img/": "@grafana/ui/dist/public/img/",
    "/public/fonts/inter/Inter-Regular": "@fontsource/inter/files/inter-latin-400-normal",
    "/public/fonts/inter/Inter-Medium": "@fontsource/inter/files/inter-latin-500-normal",
}


class _Pages(SimpleHTTPRequestHandler):
    """The page, its program, and the icons of Grafana's component library."""

    def translate_path(self, path: str) -> str:
        for asked, there in _PUBLIC.items():
            path = path.replace(asked, f"/node_modules/{there}")
        return super().translate_path(path)

    def do_GET(self) -> None:
        if self.path != "/":
            # The browser needs no icon of a page that it has left.
            with suppress(ConnectionError):
                super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(_PAGE.encode())

    def log_message(self, *_: Any) -> None:
        """Say nothing of every file."""


@contextmanager
def served() -> Iterator[str]:
    """Serve what the browser reads on a free port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Pages, directory=str(HERE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def browser(program: str) -> Iterator[Page]:
    """Hold a page of a Chromium without a window."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=program,
            args=[
                "--no-sandbox",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--no-first-run",
            ],
        )
        try:
            yield chromium.new_page(
                viewport={"width": WIDTH, "height": 1000}, timezone_id="UTC", color_scheme="dark"
            )
        finally:
            chromium.close()


def picture(page: Page, url: str, file: Path, asked: dict[str, Any]) -> None:
    """Draw one dashboard into a file.

    Raises
    ------
    RuntimeError
        A panel's query was refused, or the page's program failed.
    """
    faults: list[str] = []
    page.once("pageerror", lambda error: faults.append(str(error)))
    panels = asked["dashboard"]["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    # A row of Grafana's grid is 30 pixels and 8 between; above it are title and variables.
    page.set_viewport_size({"width": WIDTH, "height": rows * 38 + 200})
    page.goto(url)
    page.evaluate("asked => window.draw(asked)", asked)
    page.wait_for_function("window.isDrawn() || window.faults().length > 0", timeout=60_000)
    # Icons come after data: each panel with a description has one.
    page.wait_for_function(
        "most => document.querySelectorAll('[data-testid=icon-info-circle]').length >= most",
        arg=sum("description" in panel for panel in panels),
        timeout=60_000,
    )
    page.wait_for_load_state("networkidle")
    faults += page.evaluate("window.faults()")
    if faults:
        raise RuntimeError(f"{asked['dashboard']['title']}: {'; '.join(faults)}")
    page.screenshot(path=file)
