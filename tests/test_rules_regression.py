"""The regression's rules over weeks of scrapes, by promtool: Prometheus' own engine.

Schedulers are scraped every 20 minutes and rules evaluated every hour, so that weeks take seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.promtool import MIB, Phase, Promtool, Scrapes, says

LEVEL = "task_prefix:dask_scheduler_task_memory"
NO_BASELINE = "DaskTaskMemoryNoBaseline"
RATIO = f"round({LEVEL}_growth_bytes:ratio, 0.05)"


@pytest.fixture
def promtool(component: Callable[[str], str], tmp_path: Path) -> Callable[..., Promtool]:
    """Return what runs the rules, with settings."""
    return lambda **given: Promtool(
        component("promtool"), tmp_path, **{"gap": "2h", "regression_for": "1h", **given}
    )


def judge(
    promtool: Promtool, scrapes: Scrapes, fires: dict[str, Sequence[str]], **expected: Any
) -> None:
    """Hold the prefixes whose regression fires at each time against what is expected."""
    promtool.check(
        scrapes, every="1h", firing={"DaskTaskMemoryRegression": fires}, **expected
    )  # fmt: skip


def of_load(value: float) -> dict[str, float]:
    """Return the only sample of a query: that of the prefix ``load``."""
    return {'{task_prefix_name="load"}': value}


def test_growth_by_30_percent_fires_and_recovery_resolves(
    promtool: Callable[..., Promtool],
) -> None:
    """Of a scheduler that runs all the time: within a day, and until a day after it is mended."""
    scrapes = Scrapes("20m")
    scrapes.scheduler(Phase("9d", growth=100), Phase("1d", growth=130), Phase("1d", growth=100))
    judge(
        promtool(), scrapes, {"9d": [], "9d12h": [], "10d": ["load"], "11d": []},
        queries={RATIO: {"10d": of_load(1.3)}},
    )  # fmt: skip


def test_growth_that_stays_becomes_the_baseline(promtool: Callable[..., Promtool]) -> None:
    """Nobody need do anything: it resolves by itself, when enough of the baseline has it."""
    scrapes = Scrapes("20m")
    scrapes.scheduler(Phase("3d", growth=100), Phase("4d", growth=150))
    judge(
        promtool(regression_baseline="2d"), scrapes,
        {"4d": ["load"], "4d12h": ["load"], "5d12h": [], "7d": []},
    )  # fmt: skip


def test_noise_few_tasks_and_new_prefixes_do_not_fire(promtool: Callable[..., Promtool]) -> None:
    """10 % more, 5 tasks, a prefix of yesterday, three MiB for one, and a mixture of prefixes."""
    scrapes = Scrapes("20m")
    noisy = [Phase("4h", growth=growth) for growth in (90, 110) * 24]
    scrapes.scheduler(*noisy, Phase("1d", growth=110), prefix="noisy")
    before = Phase("8d", growth=100)
    scrapes.scheduler(
        before, Phase("20m", tasks=5, growth=300), Phase("23h40m", tasks=0), prefix="five"
    )
    scrapes.scheduler(
        Phase("20m", tasks=5, growth=100), Phase("8d", tasks=0), Phase("1d", growth=300),
        prefix="five-before",
    )  # fmt: skip
    scrapes.scheduler(Phase("1d", growth=300), begin="8d", prefix="new")
    scrapes.scheduler(Phase("8d", growth=1), Phase("1d", growth=3), prefix="small")
    scrapes.scheduler(before, Phase("1d", growth=300), prefix="__overflow__")
    scrapes.scheduler(before, Phase("1d", growth=300), prefix="witness")
    times = ["8d2h", "8d12h", "8d20h", "9d"]
    fires = {time: ["witness"] if time != "8d2h" else [] for time in times}
    judge(promtool(), scrapes, fires)


def test_a_job_that_runs_once_a_night(promtool: Callable[..., Promtool]) -> None:
    """A new scheduler each night: one that grew fires, until one has run that did not."""
    scrapes = Scrapes("20m")
    for night in range(10):
        growth = 130 if night == 8 else 100
        pod = f"10.0.0.{night}:8787"
        scrapes.scheduler(Phase("1h", tasks=40, growth=growth), begin=f"{night}d2h", instance=pod)
    fires = {"8d2h": [], "8d6h": ["load"], "8d20h": ["load"], "9d1h": ["load"], "9d5h": []}
    judge(
        promtool(), scrapes, fires,
        queries={
            f"{LEVEL}_growth_bytes_count:recent * 1": {"8d6h": of_load(120), "9d5h": of_load(120)},
            f"{LEVEL}_growth_bytes_count:baseline * 1": {"8d6h": of_load(7 * 120)},
        },
    )  # fmt: skip


def test_clusters_that_live_for_two_scrapes(promtool: Callable[..., Promtool]) -> None:
    """40 s at a scrape each 15 s: every task that was seen counts, once, and growth fires."""
    scrapes = Scrapes("15s")
    for number in range(14):
        growth = 130 if number >= 12 else 100
        pod = f"10.0.0.{number}:8787"
        begin = f"{5 * number + 1}m15s"
        scrapes.scheduler(Phase("30s", tasks=20, growth=growth), begin=begin, instance=pod)
    settings = {"regression_recent": "10m", "regression_baseline": "1h", "regression_for": "0s"}
    promtool(gap="10m", **settings).check(
        scrapes, every="1m",
        firing={"DaskTaskMemoryRegression": {"60m": [], "70m": ["load"]}},
        queries={
            RATIO: {"70m": of_load(1.3)},
            f"{LEVEL}_growth_bytes_count:recent * 1": {"70m": of_load(2 * 40)},
            f"{LEVEL}_tasks:baseline * 1": {"70m": of_load(12 * 40)},
        },
    )  # fmt: skip


def test_a_counter_that_begins_anew(promtool: Callable[..., Promtool]) -> None:
    """A restart under the same address fires nothing, loses a step at most, and bends no mean.

    ``load`` starts anew where a step begins. ``overtakes`` has passed its old count by the next
    scrape, with tasks far smaller: a difference of its sums would be below zero.
    """
    scrapes = Scrapes("20m")
    scrapes.scheduler(Phase("6d20m"), Phase("3d", restart=True))
    scrapes.scheduler(
        Phase("6d40m", tasks=1, growth=90_000), Phase("3d", tasks=5_000, growth=1, restart=True),
        prefix="overtakes",
    )  # fmt: skip
    mean = f"{LEVEL}_growth_bytes_sum:step / {LEVEL}_growth_bytes_count:step / {MIB}"
    both = {
        '{task_prefix_name="load"}': 100.0,
        '{task_prefix_name="overtakes"}': 1.0,
    }
    judge(
        promtool(), scrapes, {"6d1h": [], "6d3h": [], "7d": [], "8d": []},
        queries={
            mean: {"6d1h": both, "6d2h": both},
            # At 0 s the first scrape is seen, with its four.
            f'sum_over_time({LEVEL}_tasks:step{{task_prefix_name="load"}}[9d])': {
                "8d": of_load(4 * (8 * 24 * 3 + 1))
            },
        },
    )  # fmt: skip


def test_a_scheduler_out_of_sight_is_no_new_one(promtool: Callable[..., Promtool]) -> None:
    """What ran meanwhile counts once, within ``gap``; for longer nothing fires either."""
    scrapes = Scrapes("20m")
    scrapes.scheduler(Phase("4d"), Phase("1h", seen=False), Phase("4d23h"))
    scrapes.scheduler(Phase("4d"), Phase("1d", seen=False), Phase("4d"), prefix="longer")
    total = f'sum_over_time({LEVEL}_tasks:step{{task_prefix_name="load"}}[9d])'
    judge(
        promtool(), scrapes, {"4d2h": [], "5d2h": [], "6d": [], "8d": []},
        queries={total: {"8d": of_load(4 * (8 * 24 * 3 + 1))}},
    )  # fmt: skip


def test_two_scrapes_of_one_scheduler_are_one_alert(promtool: Callable[..., Promtool]) -> None:
    """Two replicas of Prometheus in one store, and a second job: the ratio is what it was."""
    scrapes = Scrapes("20m")
    for more in ({"replica": "a"}, {"replica": "b"}, {"job": "memusage"}):
        scrapes.scheduler(Phase("3d", growth=100), Phase("1d", growth=130), **more)
    judge(
        promtool(), scrapes, {"3d": [], "4d": ["load"]},
        queries={RATIO: {"4d": of_load(1.3)}},
    )  # fmt: skip
    judge(promtool(selector='job="dask",replica="a"'), scrapes, {"4d": ["load"]})


def test_larger_inputs_explain_growth(promtool: Callable[..., Promtool]) -> None:
    """As far as they have grown, and where they are of a size that can."""
    scrapes = Scrapes("20m")
    changes = {
        "explained": ((100, 200), (200, 400)),
        "beyond": ((100, 300), (200, 400)),
        "same-inputs": ((100, 200), (200, 200)),
        "tiny-inputs": ((100, 200), (1, 2)),
        "smaller-inputs": ((100, 130), (200, 100)),
    }
    for prefix, ((growth, grown), (size, resized)) in changes.items():
        scrapes.scheduler(
            Phase("3d", growth=growth, input=size),
            Phase("1d", growth=grown, input=resized),
            prefix=prefix,
        )
    fires = [prefix for prefix in changes if prefix != "explained"]
    judge(promtool(), scrapes, {"3d": [], "4d": fires})


def test_growth_known_of_fewer_tasks_is_not_compared(promtool: Callable[..., Promtool]) -> None:
    """Without jemalloc only the largest tasks have one: their mean says nothing of before."""
    scrapes = Scrapes("20m")
    before = Phase("3d", tasks=20, growth=100, known=10)
    scrapes.scheduler(before, Phase("1d", tasks=20, growth=200, known=2), prefix="fewer")
    scrapes.scheduler(before, Phase("1d", tasks=20, growth=200, known=20), prefix="more")
    judge(promtool(), scrapes, {"3d": [], "4d": ["more"]})


def test_clusters_are_kept_apart_and_named(promtool: Callable[..., Promtool]) -> None:
    """Each has its own baseline; the alert says which grew, from what, to what, and its page.

    Whatever the prefix is: this is one that Dask makes of a key that is a tuple.
    """
    prefix = 'a,b"q"\\'
    scrapes = Scrapes("20m")
    where = {"namespace": "prod", "dask_cluster": "etl"}
    # Nothing runs where the windows meet: whether they share that step differs between releases.
    grown = (
        Phase("2d22h", growth=100, input=50), Phase("4h", tasks=0),
        Phase("22h", growth=200, input=52),
    )  # fmt: skip
    scrapes.scheduler(*grown, prefix=prefix, **where)
    other = {**where, "dask_cluster": "other"}
    scrapes.scheduler(Phase("4d", growth=900), prefix=prefix, **other)
    fired = {
        "alertname": "DaskTaskMemoryRegression",
        "eval_time": "4d",
        "exp_alerts": [
            {
                "exp_labels": {**where, "task_prefix_name": prefix, "severity": "warning"},
                "exp_annotations": {
                    "summary": f"Tasks {prefix} need 100 % more memory than they did.",
                    "description": f"Cluster etl: tasks {prefix} of the last 1d grow by 200MiB "
                    "at their peak, in the mean; in the 7d before it was 100MiB. Their inputs "
                    "are 1.04 times what they were.",
                    "runbook_url": "https://wiki/DaskTaskMemoryRegression.md",
                },
            }
        ],
    }
    judge(
        promtool(runbook_base="https://wiki"), scrapes, {"4d": [prefix]}, texts=[fired]
    )  # fmt: skip


def test_names_that_change_each_night_need_another_grouping(
    promtool: Callable[..., Promtool],
) -> None:
    """With ``group-labels`` of the namespace alone, clusters of random names share a baseline.

    Without, it is told that nothing is judged, all day; and of no namespace whose clusters stay.
    """
    scrapes = Scrapes("20m")
    for night in range(6):
        growth = 130 if night == 5 else 100
        for namespace, cluster in (("prod", f"job-{night}"), ("kept", "job")):
            scrapes.scheduler(
                Phase("1h", tasks=40, growth=growth), begin=f"{night}d2h", instance=f"{night}:1",
                namespace=namespace, dask_cluster=cluster,
            )  # fmt: skip
    # New ones beside one that stays, and none has gone: there is not enough to compare with yet.
    for number in range(4):
        cluster = f"team-{number}"
        scrapes.scheduler(Phase("1d", tasks=40), begin="5d", namespace="new", dask_cluster=cluster)
    told = says(
        NO_BASELINE, "5d20h",
        "Most tasks of prod ran in clusters of new names, which have no baseline.",
        "100 % of the tasks of the last 1d ran in clusters that were not there before, while "
        "others have gone. Where each cluster has a new name no regression is ever judged: give "
        "them one name, or let them share a baseline by group-labels.",
        "info", namespace="prod",
    )  # fmt: skip
    all_day = {f"5d{hour}h": [""] for hour in range(24)}
    by_cluster = 'count by (namespace) (ALERTS{alertname="DaskTaskMemoryRegression"})'
    promtool().check(
        scrapes, every="1h",
        firing={NO_BASELINE: {"2d12h": [], **all_day}},
        queries={by_cluster: {"5d6h": {'{namespace="kept"}': 1}}}, texts=[told],
    )  # fmt: skip
    promtool(group_labels="namespace").check(
        scrapes, every="1h",
        queries={
            by_cluster: {"5d6h": {'{namespace="kept"}': 1, '{namespace="prod"}': 1}},
            f'ALERTS{{alertname="{NO_BASELINE}"}}': {"5d6h": {}},
        },
    )  # fmt: skip
