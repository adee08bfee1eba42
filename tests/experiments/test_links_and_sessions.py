"""Links: the model's arithmetic, and the emulation, which takes at least the time that the model gives to the link."""

from dataclasses import asdict

import pandas as pd
import pytest

from salvit_core import preset
from salvit_core.experiments import execute, latency
from salvit_core.experiments.runs import PrivateRun
from salvit_core.private import LINKS, Link

TINY = preset("cct_2_3x1", "SA 2Quad", layers=1)


@pytest.mark.parametrize(
    "rtt, bandwidth, message",
    [
        (-1e-3, 1e6, "rtt is -0.001: give seconds"),
        (float("nan"), 1e6, "rtt is nan: give seconds"),
        (1e-3, 0, "bandwidth is 0: give bytes per second"),
        (1e-3, -5.0, "bandwidth is -5.0: give bytes per second"),
        (1e-3, float("nan"), "bandwidth is nan: give bytes per second"),
    ],
)
def test_an_impossible_link_is_refused(rtt, bandwidth, message):
    with pytest.raises(ValueError, match=message):
        Link(rtt, bandwidth)


def test_a_round_is_half_a_round_trip_and_bytes_take_their_time():
    link = Link(0.04, 1e6)
    assert link.seconds(10, 0) == pytest.approx(0.2)
    assert link.seconds(0, 5e6) == pytest.approx(5.0)
    table = pd.DataFrame({"seconds": [1.0, 2.0], "rounds": [4, 6], "serial_bytes": [1e6, 4e6], "layer": ["a", "b"]})
    assert link.latency(table) == pytest.approx(3.0 + 0.2 + 5.0)
    assert Link(0.0, float("inf")).latency(table) == pytest.approx(3.0)


def test_named_links_are_ordered_from_near_to_far():
    near = [LINKS[name].seconds(500, 50e6) for name in ("LAN (Cheetah)", "LAN (CrypTFlow2)")]
    far = [LINKS[name].seconds(500, 50e6) for name in ("WAN (Cheetah)", "WAN (CrypTFlow2)")]
    assert near == sorted(near) and far == sorted(far) and near[-1] < far[0]


def record(*queries, **config):
    """A record of queries, each a list of (seconds, rounds, bytes) per layer."""
    rows = [
        {"query": i, "layer": f"block {j + 1}", "kind": "MLP", "seconds": s, "rounds": r, "bytes": b, **config}
        for i, query in enumerate(queries)
        for j, (s, r, b) in enumerate(query)
    ]
    return {"metrics": {"operations": rows}}


def test_the_cost_of_a_query_is_the_median_or_the_least():
    found = record([(1.0, 3, 100), (2.0, 4, 300)], [(9.0, 3, 100), (2.0, 4, 300)], [(3.0, 3, 100), (2.0, 4, 300)])
    found["metrics"]["operations"] = [{**row, "serial_bytes": 150} for row in found["metrics"]["operations"]]
    query = latency.costs(found)
    assert (query["seconds"], query["rounds"], query["bytes"], query["serial_bytes"]) == (5.0, 7, 400, 300)
    assert latency.costs(found, "min")["seconds"] == 3.0
    link = Link(2.0, 100.0)
    assert latency.on_link(found, link) == pytest.approx(5.0 + 7.0 + 3.0)
    assert latency.on_link(found, link, "min") == pytest.approx(3.0 + 7.0 + 3.0)
    assert latency.on_link(found, None) == 5.0


def test_records_of_before_have_no_queries_and_nothing_offline():
    found = record([(1.0, 3, 100), (2.0, 4, 300)])
    for row in found["metrics"]["operations"]:
        del row["query"]
    query = latency.costs(found)
    assert query["serial_bytes"] == query["bytes"] == 400
    assert query["offline_seconds"] == query["offline_bytes"] == 0


def test_the_link_is_part_of_a_runs_config():
    runs = [PrivateRun(TINY), PrivateRun(TINY, link=Link(0.01, 1e6))]
    assert asdict(runs[1])["link"] == {"rtt": 0.01, "bandwidth": 1e6}
    assert len(set(runs)) == 2


@pytest.mark.processes
@pytest.mark.parametrize("protocol", ["stock", "tuned"])
def test_an_emulated_link_takes_at_least_its_time(protocol):
    bare, slow, narrow = (
        execute._private(PrivateRun(TINY, protocol, queries=queries, link=link))
        for queries, link in ((2, None), (1, Link(0.02, 1e9)), (1, Link(0.0, 2e6)))
    )
    bare, slow, narrow = ({"metrics": metrics} for metrics in (bare, slow, narrow))
    query = latency.costs(bare, "min")
    for name in ("rounds", "bytes", "serial_bytes"):
        assert latency.costs(slow)[name] == latency.costs(narrow)[name] == query[name]
    assert query["rounds"] > 20 and query["seconds"] > 0
    assert latency.costs(slow)["seconds"] > query["rounds"] * 0.02 / 2
    assert latency.costs(narrow)["seconds"] > query["serial_bytes"] / 2e6


@pytest.mark.processes
def test_a_session_masks_its_weights_once_and_every_query_costs_the_same():
    metrics = execute._private(PrivateRun(TINY, batch=2, queries=3))
    assert metrics["violations"] == [] and metrics["logit_error"] < 0.05
    rows = pd.DataFrame(metrics["operations"])
    per_query = rows.groupby("query")[["rounds", "bytes", "offline_bytes"]].sum()
    assert len(per_query) == 3 and per_query.nunique().eq(1).all()
    # The same number of rounds as one image alone, and more bytes.
    alone = pd.DataFrame(execute._private(PrivateRun(TINY))["operations"])
    assert per_query["rounds"].iloc[0] == alone["rounds"].sum()
    assert alone["bytes"].sum() < per_query["bytes"].iloc[0] < 2.1 * alone["bytes"].sum()


@pytest.mark.processes
def test_attention_alone_costs_what_it_costs_in_the_network():
    kinds = ["projection", "scores", "normaliser", "values"]
    alone = pd.DataFrame(execute._private(PrivateRun(TINY, alone=True))["operations"])
    whole = pd.DataFrame(execute._private(PrivateRun(TINY))["operations"])
    elsewhere = alone[alone["layer"] != "attention"]
    assert elsewhere["rounds"].sum() == 4 + 1  # the result is rounded, and goes to the client
    for cost in ("rounds", "bytes"):
        inside = whole[whole["layer"] == "block 1"].set_index("kind")[cost]
        assert (alone[alone["layer"] == "attention"].set_index("kind")[cost][kinds] == inside[kinds]).all()
