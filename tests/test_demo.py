"""`dask memusage demo`, run as a person runs it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner, Result

from dask_memusage_exporter.cli import memusage
from dask_memusage_exporter.cli.summary import Growth, by_prefix, find, growth_of
from dask_memusage_exporter.cli.tables import fit, growth, size
from dask_memusage_exporter.cli.texts import LARGE_NAME, SMALL_FILES
from dask_memusage_exporter.config import MIB
from dask_memusage_exporter.records import TaskMemory
from tests.conftest import Metrics, counted, rows, run_cli, wait_until

LINE = b"the quick brown fox jumps over the lazy dog\n"
COLUMNS = ["task_key", "min_memory_mb", "max_memory_mb"]


@pytest.fixture
def surroundings(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Return where and with what to run; fail if the run leaves a file or a process behind."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    here = tmp_path / "here"
    here.mkdir()
    yield {"cwd": here, "env": {**os.environ, "TMPDIR": str(temporary)}}
    wait_until(lambda: not list(_processes(str(temporary))), what="the demo's processes to end")
    assert os.listdir(temporary) == []


def _processes(temporary: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("TMPDIR") == temporary:
                yield process


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with one large text, a small one, an empty one, and one that is none."""
    texts = tmp_path / "texts"
    (texts / "below").mkdir(parents=True)
    (texts / "below" / "large.txt").write_bytes(LINE * (8 * MIB // len(LINE)))
    (texts / "below" / os.fsdecode(b"n\xffot\nutf8")).write_bytes(bytes(range(256)))
    (texts / "small.txt").write_bytes(LINE)
    (texts / "empty.txt").write_bytes(b"")
    return texts


def demo(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the demo as a process."""
    return run_cli("memusage", "demo", *arguments, **options)


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start the demo in a process group of its own, as a terminal does."""
    return subprocess.Popen(
        [sys.executable, "-m", "dask", "memusage", "demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def test_default_run_finds_the_large_file(surroundings: dict[str, Any]) -> None:
    """The one file of 25 MiB needs hundreds of MiB, the small ones next to nothing."""
    surroundings["env"] |= {
        # What a real cluster is configured by on this machine is left out.
        "DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "true",
        "DASK_DISTRIBUTED__COMM__DEFAULT_SCHEME": "tls",
        "DASK_MEMUSAGE__CSV__COLUMNS": "full",
        "DASK_MEMUSAGE__CSV__PATH": str(surroundings["cwd"] / "production.csv"),
    }
    with socket.socket() as taken:
        with suppress(OSError):  # it is taken already
            taken.bind(("127.0.0.1", 8787))
            taken.listen()
        run = demo("--json", **surroundings)

    assert run.returncode == 0, run.stderr
    assert run.stderr.splitlines() == ["Starting 2 worker processes ...", "Counting words"]
    report = json.loads(run.stdout)
    assert report["input"]["generated"]
    assert report["input"]["files"] == SMALL_FILES + 1
    assert not report["failed"]
    [prefix] = report["prefixes"]
    assert (prefix["task_prefix"], prefix["tasks"]) == ("calculate_top_10", SMALL_FILES + 1)
    assert sum(prefix["scopes"].values()) == SMALL_FILES + 1
    assert prefix["scopes"].get("shared", 0) == sum(prefix["reasons"].values())

    worst, *others = report["worst_tasks"]
    assert (worst["file"], worst["file_bytes"]) == (LARGE_NAME, 25 * MIB)
    assert worst["scope"] == "process"
    assert worst["growth_bytes"] > 200 * MIB
    assert worst["key"] == prefix["worst_key"] == report["finding"]["worst_key"]
    assert prefix["peak_bytes"]["max"] == worst["peak_bytes"]
    assert prefix["peak_bytes"]["p95"] < worst["peak_bytes"] - 200 * MIB
    for other in others:
        assert other["peak_bytes"] - other["start_bytes"] < 20 * MIB
    assert report["finding"]["growth_bytes"] == worst["growth_bytes"]
    assert report["finding"]["median_growth_at_most_bytes"] < 20 * MIB

    assert [path.name for path in surroundings["cwd"].iterdir()] == ["memusage.csv"]
    table = rows(report["csv"]["path"])
    assert list(table[0]) == COLUMNS
    assert len({row["task_key"] for row in table}) == len(table) == SMALL_FILES + 1
    [row] = [row for row in table if row["task_key"] == worst["key"]]
    assert float(row["max_memory_mb"]) * MIB == worst["peak_bytes"]


def test_tables_fit_a_terminal_and_tell_of_failures(
    surroundings: dict[str, Any], folder: Path
) -> None:
    """A file that cannot be read to its end is one failed task; the tables are of the rest."""
    # Opens, and its first byte is an input/output error, for root too.
    (folder / "broken.txt").symlink_to("/proc/self/mem")
    os.mkfifo(folder / "pipe")  # would wait for ever
    run = demo("--input", str(folder), "--csv", "out.csv", **surroundings)

    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stdout + run.stderr
    lines = run.stdout.splitlines()
    # A path is for copying, and not cut.
    assert max(len(line) for line in lines if not line.startswith("CSV ")) <= 100
    assert "1 task of 5 failed; the tables are of the rest:" in lines
    assert "  broken.txt: OSError: [Errno 5] Input/output error" in lines
    [prefix] = [line.split() for line in lines if line.startswith("calculate_top_10 ")]
    assert prefix[1] == "4"
    [large] = [line for line in lines if line.startswith("below/large.txt")]
    assert "8.00 MiB" in large
    assert " process " in large
    assert any(line.startswith("below/n\ufffdot?utf8") for line in lines)
    median = prefix[prefix.index("MiB", 7) + 1]
    found = "The worst task " in run.stdout and run.stdout.endswith("large.txt (8.00 MiB).\n")
    assert found == (median != "-")
    table = rows(surroundings["cwd"] / "out.csv")
    assert list(table[0]) == COLUMNS
    assert len(table) == 5  # the failed one too, as in the old tool


@pytest.mark.parametrize("source", ["auto", "kernel", "a bad path"])
def test_tasks_that_overlap(
    source: str, surroundings: dict[str, Any], folder: Path, request: pytest.FixtureRequest
) -> None:
    """With two threads jemalloc knows whose memory it was; without it, the demo says so."""
    if source == "auto":
        request.getfixturevalue("jemalloc")
    for name in ("a.txt", "b.txt"):
        (folder / name).write_bytes((folder / "below" / "large.txt").read_bytes())
    if source == "a bad path":
        surroundings["env"] |= {"DASK_MEMUSAGE__JEMALLOC": "/no/such/libjemalloc.so.2"}
    else:
        surroundings["env"] |= {"DASK_MEMUSAGE__SOURCE": source}
    run = demo("--input", str(folder), "--workers", "1", "--threads", "2", **surroundings)

    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    large = [line for line in lines if line and line[0] in ("a.txt", "b.txt", "below/large.txt")]
    assert len(large) == 3
    text = " ".join(run.stdout.split())
    if source == "auto":
        assert {line[-2] for line in large} == {"thread"}
        assert "Growth is known for" in text
        assert "It is all that can be read without jemalloc" in text
    else:
        # Two at once; the third may find itself alone.
        shared = [line for line in large if line[-2] == "shared/overlap"]
        assert len(shared) >= 2
        assert {line[5] for line in shared} == {"-"}
        assert " overlap: another task ran in the process meanwhile" in text
        assert "run with --threads 1" in text
        assert "The worst task needs" not in text or len(shared) < 3
        assert ("/no/such/libjemalloc.so.2: there is no such file" in text) == (" " in source)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_serve_stays_up_for_a_scrape(
    surroundings: dict[str, Any], folder: Path, number: signal.Signals
) -> None:
    """/metrics has the tasks until Ctrl-C, SIGTERM or the terminal's end; then it ends with 0."""
    process = start("--input", str(folder), "--serve", "--json", **surroundings)
    assert process.stdout is not None
    text = ""
    while not text.endswith("\n}\n"):
        line = process.stdout.readline()
        assert line, process.communicate()
        text += line
    report = json.loads(text)
    scheduler, *workers = (
        int(url.removeprefix("http://127.0.0.1:").removesuffix("/metrics"))
        for url in (report["metrics"]["scheduler"], *report["metrics"]["workers"])
    )
    name = "dask_scheduler_task_memory_workers"
    assert Metrics.read(scheduler).total(name) == len(workers) == 2
    assert counted(workers, "calculate_top_10") == report["input"]["files"]

    if number == signal.SIGTERM:
        process.send_signal(number)
    else:
        os.killpg(process.pid, number)  # a terminal sends it to the workers too
    rest, notes = process.communicate(timeout=60)
    assert process.returncode == 0
    assert rest == ""
    assert notes.splitlines()[1:] == [
        "Counting words",
        "Serving /metrics until Ctrl-C ...",
        "",
        "Ending ...",
    ]


def test_interrupt_is_quiet(surroundings: dict[str, Any]) -> None:
    """Ctrl-C while the workers start leaves neither a traceback nor anything behind."""
    process = start(**surroundings)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("Starting")
    # Once: the workers' start is deaf to it for a moment, so again until it is heard.
    wait_until(lambda: _interrupted(process), what="the demo to end")
    out, notes = process.communicate()
    assert (process.returncode, out) == (130, "")
    assert notes.replace("Counting words\n", "") == "\nEnding ...\n"


def _interrupted(process: subprocess.Popen[str]) -> bool:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    return process.poll() is not None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--input", "missing"], "no folder 'missing'"),
        (["--input", "file"], "'file' is not a folder"),
        (["--input", ""], "'' is not a folder"),
        (["--input", "empty"], "no files in 'empty'"),
        (["--input", "only\nlink"], "no files in"),
        (["--csv", "missing/out.csv"], "'missing/out.csv' cannot be written"),
        (["--csv", "empty"], "'empty' cannot be written"),
        (["--csv", "pipe"], "'pipe' cannot be written"),
        (["--input", ".", "--csv", "file"], "'file' is one of the files of --input"),
        (["--workers", "0"], "'--workers'"),
        (["--threads", "-1"], "'--threads'"),
        (["--worker", "1"], "Did you mean"),
        (["texts"], "unexpected extra argument"),
    ],
)
def test_wrong_call_is_one_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    """What is wrong with the input or the call is said in one line, with status 2."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "only\nlink").mkdir()
    (tmp_path / "only\nlink" / "dangling").symlink_to("nowhere")
    (tmp_path / "file").write_text("my own words")
    os.mkfifo(tmp_path / "pipe")
    _one_line(demo(*arguments, cwd=tmp_path), words)
    assert (tmp_path / "file").read_text() == "my own words"
    assert not (tmp_path / "memusage.csv").exists()


def _one_line(run: subprocess.CompletedProcess[str], words: str) -> None:
    assert run.returncode == 2, run
    assert run.stdout == ""
    [line] = run.stderr.splitlines()
    assert words in line
    assert line.startswith("Error: ")


def test_wrong_setting_is_one_line(tmp_path: Path) -> None:
    """A wrong setting of Dask's configuration is told as any wrong call."""
    environment = {**os.environ, "DASK_MEMUSAGE__CSV__COLUMNS": "three"}
    _one_line(demo(cwd=tmp_path, env=environment), "memusage.csv.columns: 'three' is not one of")


@pytest.mark.parametrize(
    "arguments",
    [["demo", "--workers", "1", "--input", "texts"], ["doctor"], ["dashboards", "--out", "o"]],
)
def test_full_disk_is_one_line(surroundings: dict[str, Any], arguments: list[str]) -> None:
    """Where a verb's output cannot be written, one line says so; its files are there."""
    (surroundings["cwd"] / "texts").mkdir()
    (surroundings["cwd"] / "texts" / "words.txt").write_bytes(LINE)
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-m", "dask", "memusage", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
            **surroundings,
        )
    assert run.returncode == 2, run
    assert "Traceback" not in run.stderr
    line = run.stderr.splitlines()[-1]
    assert line.startswith("Error: standard output cannot be written (No space left on device)")
    if arguments[0] == "demo":
        assert len(rows(surroundings["cwd"] / "memusage.csv")) == 1
    if arguments[0] == "dashboards":
        assert (surroundings["cwd"] / "o" / "prometheus.yml").exists()


def test_unknown_verb_is_one_line() -> None:
    """A verb that there is not is told as any wrong call."""
    _one_line(run_cli("memusage", "dance"), "No such command 'dance'")


@pytest.fixture
def invoke() -> Callable[..., Result]:
    """Return what runs the demo in this process."""
    return lambda *arguments: CliRunner().invoke(memusage, ["demo", *arguments])


@pytest.mark.parametrize("closed", ["", "below", "below/text"])
def test_unreadable_input_is_one_line(invoke: Callable[..., Result], closed: str) -> None:
    """A folder, or something in it, that may not be read is told before any work starts."""
    # Not tmp_path, which others than its owner may not enter. Root may read everything.
    with tempfile.TemporaryDirectory() as folder:
        below = Path(folder) / "below"
        below.mkdir()
        (below / "text").write_text("words")
        for path in (Path(folder), below):
            path.chmod(0o755)
        (Path(folder) / closed).chmod(0)
        as_root = os.geteuid() == 0
        if as_root:
            os.seteuid(65534)
        try:
            run = invoke("--input", folder)
        finally:
            if as_root:
                os.seteuid(0)
            for path in (Path(folder), below):
                path.chmod(0o755)
    assert run.exit_code == 2
    assert run.output.startswith("Error: --input: cannot read ")
    assert repr(str(Path(folder) / closed)) in run.output
    assert len(run.output.splitlines()) == 1


def test_own_csv_is_no_input(surroundings: dict[str, Any], folder: Path) -> None:
    """Run twice in the folder itself, the first run's CSV is not counted as text."""
    (folder / "memusage.csv").write_text(",".join(COLUMNS) + "\n")
    (folder / "below" / "large.txt").unlink()
    run = demo("--input", ".", "--json", cwd=folder, env=surroundings["env"])
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["input"]["files"] == 3


def test_task_that_kills_its_worker(surroundings: dict[str, Any], folder: Path) -> None:
    """On a machine with too little memory the others are still told of, and why it failed."""
    (folder / "below" / "large.txt").write_bytes(LINE * (24 * MIB // len(LINE)))
    run = subprocess.run(
        [sys.executable, "-c", SMALL_MACHINE, "demo", "--input", str(folder), "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **surroundings,
    )
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    report = json.loads(run.stdout)
    [failed] = report["failed"]
    assert failed["file"] == "below/large.txt"
    assert "for want of memory" in failed["why"]
    assert report["prefixes"][0]["tasks"] == 3
    assert len(report["metrics"]["workers"]) == 2  # it has been started anew


SMALL_MACHINE = """
from dask_memusage_exporter.cli import local, memusage

local.MEMORY_LIMIT = 200 * 2**20
memusage()
"""


def test_nothing_but_failures(surroundings: dict[str, Any], tmp_path: Path) -> None:
    """Where every task fails there is nothing to show, and the first failure is told."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "broken").symlink_to("/proc/self/mem")
    run = demo("--input", str(tmp_path / "texts"), "--workers", "1", **surroundings)
    assert (run.returncode, run.stdout) == (2, "")
    assert "Error: all tasks failed; the first: " in run.stderr
    assert "Traceback" not in run.stderr


def record(number: int, rise: int, reason: str | None, reusable: int | None) -> TaskMemory:
    """Return a record whose process grew by a number of MiB."""
    return TaskMemory(
        f"f-{number}", "f", "tcp://w", 0.0, 1.0, 100 * MIB, (100 + rise) * MIB,
        rise * MIB if reason is None else None, "shared" if reason else "process", reason,
        None if reusable is None else reusable * MIB, 0, 1, None, None, "finished", None,
    )  # fmt: skip


def test_growth_that_is_not_known_is_bounded_or_unknown() -> None:
    """A warm heap bounds the growth where it was asked; all else says nothing, never zero."""
    assert growth_of(record(1, 5, None, 0)) == (5 * MIB, 5 * MIB)
    assert growth_of(record(1, 5, "warm_heap", 3)) == (0, 8 * MIB)
    for unknown in (record(1, 5, "warm_heap", None), record(1, 5, "overlap", 3)):
        assert growth_of(unknown) == Growth(0, float("inf"))
        assert growth(growth_of(unknown)) == "-"


def test_quantiles_of_bounds_are_bounds() -> None:
    """The maximum is exact where no bound reaches it; the median is as good as the bounds are."""
    some = [*(record(n, 1, "warm_heap", n) for n in range(1, 5)), record(9, 400, None, 0)]
    [one] = by_prefix(some)
    median, _, maximum = one.growth
    assert (median.exact, median.bound) == (None, 4 * MIB)
    assert maximum.exact == 400 * MIB
    assert one.worst.key == "f-9"
    assert (one.scopes, one.reasons) == ({"shared": 4, "process": 1}, {"warm_heap": 4})
    found = find(some)
    assert found is not None
    assert (found.worst.key, found.certain, found.median.bound) == ("f-9", True, 4 * MIB)


def test_no_finding_that_the_records_do_not_bear() -> None:
    """Nothing is said where the median is not known; "the worst" only where none can be worse."""
    large = record(9, 400, None, 0)
    hidden = [record(n, 0, "overlap", None) for n in range(4)]
    assert find([large, *hidden]) is None
    assert find([large]) is None
    assert find([large, record(8, 390, None, 0)]) is None
    found = find([large, hidden[0], *(record(n, 1, None, 0) for n in range(4))])
    assert found is not None
    assert not found.certain


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.98 KiB"),
        (2.44 * MIB, "2.44 MiB"),
        (80.4 * MIB, "80.4 MiB"),
        (350 * MIB, "350 MiB"),
        (1023.9 * MIB, "1.00 GiB"),
        (2**60, "1048576 TiB"),
    ],
)
def test_sizes_have_three_digits(count: float, text: str) -> None:
    """A size is short, and never shows more than is known."""
    assert size(count) == text


def test_long_names_are_cut_in_the_middle() -> None:
    """Both ends of a path tell it from others."""
    assert fit("short", 10) == "short"
    cut = fit("a" * 30 + "b" * 30, 20)
    assert len(cut) == 20
    assert cut.startswith("a")
    assert cut.endswith("b")
