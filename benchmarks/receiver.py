"""A receiver of OTLP over HTTP in a process of its own: ``python -m benchmarks.receiver``.

It takes everything and looks at none of it, so that it takes little of the processors that are
measured. ``GET /`` returns how many bytes have come, by path, as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """Takes requests, several on one connection."""

    protocol_version = "HTTP/1.1"
    #: Bytes by path.
    came: dict[str, int] = {}  # the server's, not the request's

    def do_POST(self) -> None:
        size = len(self.rfile.read(int(self.headers["Content-Length"])))
        self.came[self.path] = self.came.get(self.path, 0) + size
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(json.dumps(self.came).encode())

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def came(endpoint: str) -> dict[str, int]:
    """Return how many bytes a receiver has been sent, by path."""
    with urllib.request.urlopen(endpoint) as answer:
        found: dict[str, int] = json.load(answer)
    return found


@contextmanager
def receiver() -> Iterator[str]:
    """Hold a receiver in a process of its own; yield its endpoint."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.receiver"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
