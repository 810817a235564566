"""Docs and README are true: generated pages are current, commands and examples run as written."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Metrics, wait_until

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def _environment(tmp_path: Path) -> dict[str, str]:
    # The commands of this interpreter's environment come first, as in an activated one.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "TMPDIR": str(tmp_path)}


@pytest.mark.parametrize("page", ["metrics.md", "settings.md", "alerts.md"])
def test_generated_pages_are_current(page: str) -> None:
    """`make docs` would change nothing."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert (ROOT / "docs" / page).read_text() == generate.PAGES[page](), "run make docs"


@pytest.mark.parametrize("number", range(len(_blocks("python"))))
def test_python_examples_of_the_readme_run(number: int, tmp_path: Path) -> None:
    """Each Python block of the README is a script that ends well and leaves what it says."""
    (tmp_path / "example.py").write_text(_blocks("python")[number])
    done = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        env=_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if "memusage.csv" in _blocks("python")[number]:
        assert (tmp_path / "memusage.csv").read_text().count("\n") > 1


def _commands() -> list[str]:
    lines = "".join(_blocks("sh")).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line and not line.startswith("#")]


def _commands_of_docs() -> list[str]:
    """Return what other pages tell people to run without a cluster, and the README does not."""
    pages = "\n".join(page.read_text() for page in sorted((ROOT / "docs").rglob("*.md")))
    told = re.findall(r"^(dask memusage .*?)(?:  +#.*)?$", pages, re.MULTILINE)
    new = dict.fromkeys(one for one in told if one not in _commands())
    return [one for one in new if "--scheduler" not in one]


#: Run by the developer, by CI itself or by other tests (helm); each must exist.
_ELSEWHERE = ("git clone", "make ", "cd ", "pip install", "helm ", "python3 -m venv", ". .venv")


@pytest.mark.parametrize(
    "command",
    [one for one in (*_commands(), *_commands_of_docs()) if not one.startswith(_ELSEWHERE)],
)
def test_commands_of_the_readme_run(command: str, tmp_path: Path) -> None:
    """Each command of README and docs exits 0, or serves our series until it is ended."""
    variables, words = {}, shlex.split(command)
    while "=" in words[0]:
        name, value = words.pop(0).split("=", 1)
        variables[name] = value
    environment = {**_environment(tmp_path), **variables}
    if words[:2] not in (["dask", "scheduler"], ["dask", "worker"]):
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=170,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return
    with Server(words, tmp_path, environment) as server:
        server.wait_for_our_series()


class Server:
    """`dask scheduler` or `dask worker` as it stands in the README, on free ports."""

    def __init__(self, words: list[str], cwd: Path, environment: dict[str, str]) -> None:
        self._log = cwd / "log"
        self._kind = words[1]
        self._helper: subprocess.Popen | None = None
        options = {"cwd": cwd, "env": environment, "stderr": subprocess.STDOUT}
        ports = ["--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0"]
        with open(self._log, "w") as log:
            if self._kind == "worker":
                file = cwd / "scheduler.json"
                command = [
                    "dask",
                    "scheduler",
                    "--port",
                    "0",
                    "--scheduler-file",
                    str(file),
                    *ports,
                ]
                self._helper = subprocess.Popen(command, **options, stdout=subprocess.DEVNULL)
                words = [w for w in words if not w.startswith("tcp://")]
                words += ["--scheduler-file", str(file)]
                wait_until(file.exists)
            else:
                words = [*words, "--port", "0"]
            self._process = subprocess.Popen([*words, *ports], **options, stdout=log)

    def __enter__(self) -> Server:
        return self

    def wait_for_our_series(self) -> None:
        """Wait until the page that the log names has series of ours."""

        def seen() -> bool:
            assert self._process.poll() is None, self._log.read_text()
            found = re.search(r"dashboard at:\s+(?:http://)?127.0.0.1:(\d+)", self._log.read_text())
            name = f"dask_{self._kind}_task_memory_exporter_info"
            return found is not None and Metrics.read(int(found[1])).total(name) == 1

        wait_until(seen, what=f"our series of the {self._kind}")

    def __exit__(self, *_: object) -> None:
        for process in (self._process, self._helper):
            if process is not None:
                process.send_signal(signal.SIGINT)
                process.wait(timeout=30)


def test_make_targets_of_the_readme_exist() -> None:
    """Each `make TARGET` that the README names is a target."""
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_links_of_the_docs_lead_somewhere() -> None:
    """Each relative link of README and docs is a file of this repository."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
