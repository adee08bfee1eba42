"""Latency records as tables: protocols stay apart, older records keep their meaning, ratios have the right baseline."""

import pandas as pd
import pytest

from salvit_core import METHODS, preset
from salvit_core.experiments import latency, links_and_dealers
from salvit_core.experiments.runs import PrivateRun, name_of
from salvit_core.models.operations import KINDS
from salvit_core.models.rows import ROWS

COSTS = {"seconds": 1.0, "rounds": 10, "bytes": 1000}


def record(method, protocol="stock", query=0, seconds=1.0, later=False):
    """A run and its record, of two layers: LayerNorm takes a quarter of the seconds."""
    run = PrivateRun(preset("cct_7_3x1", method), protocol, query=query)
    rows = [
        {"layer": "block 1", "kind": "LayerNorm", **COSTS, "seconds": seconds / 4},
        {"layer": "block 1", "kind": "scores", **COSTS, "seconds": seconds * 3 / 4},
    ]
    if later:
        rows = [{**row, "serial_bytes": 1500, "offline_seconds": 0.125, "offline_bytes": 2_000_000} for row in rows]
    return run, {"key": "0", "metrics": {"operations": rows}}


def mixed():
    """Three queries with `stock`, from before the dealer's part was told apart, and one with `tuned`."""
    found = [record("SA softmax", query=q, seconds=s) for q, s in enumerate((8.0, 9.0, 16.0))]
    found += [record("SA 2Quad", query=q, seconds=s) for q, s in enumerate((3.0, 6.0, 4.0))]
    found += [record("SA softmax", "tuned", seconds=2.0, later=True)]
    return dict([*found, record("SA 2Quad", "tuned", seconds=1.5, later=True)])


def test_records_of_two_protocols_are_kept_apart():
    rows = latency.operations(mixed())
    assert set(rows["protocol"]) == {"stock", "tuned"}
    table = latency.totals(rows)
    assert table.index.names == ["protocol", "method"]
    assert table["seconds"].to_dict() == {
        ("stock", "SA softmax"): 9.0,
        ("stock", "SA 2Quad"): 4.0,
        ("tuned", "SA softmax"): 2.0,
        ("tuned", "SA 2Quad"): 1.5,
    }
    assert table["ratio"].loc["stock"].to_dict() == {"SA softmax": 1.0, "SA 2Quad": pytest.approx(4 / 9)}
    assert table["ratio"].loc["tuned"].to_dict() == {"SA softmax": 1.0, "SA 2Quad": 0.75}  # its own baseline
    assert table["queries"].loc["stock"].to_list() == [3, 3] and table["queries"].loc["tuned"].to_list() == [1, 1]
    kinds = latency.by_kind(rows, "seconds")
    assert kinds.loc[("tuned", "SA softmax")].to_dict() == {"LayerNorm": 0.5, "scores": 1.5}
    # In the order of all methods and kinds, so that each looks the same in every figure.
    assert tuple(kinds.columns.categories) == KINDS
    assert list(rows["method"].cat.categories) == list(ROWS)


def test_ranges_are_of_a_querys_whole_cost_where_any_method_has_several():
    rows = latency.operations(mixed())
    table = latency.by_kind(rows, "seconds", ranges=True)
    assert list(table.columns) == ["LayerNorm", "scores", "low", "high"]
    assert table.loc[("stock", "SA 2Quad"), ["low", "high"]].tolist() == [3.0, 6.0]
    assert table.loc[("tuned", "SA 2Quad"), ["low", "high"]].tolist() == [1.5, 1.5]  # one query
    assert "low" not in latency.by_kind(rows[rows["protocol"] == "tuned"], "seconds", ranges=True)
    beside = links_and_dealers.by_kind_beside(rows, "seconds", ranges=True)
    assert beside.loc["SA 2Quad, stock", ["low", "high"]].tolist() == [3.0, 6.0]
    assert beside.loc["SA 2Quad, tuned"].drop(["low", "high"]).sum() == 1.5  # the range is no part of the stack


def test_a_mixed_table_holds_each_protocols_own():
    rows = latency.operations(mixed())
    for protocol in ("stock", "tuned"):
        alone = latency.totals(rows[rows["protocol"] == protocol])
        assert alone.index.name == "method" and list(alone.index) == ["SA softmax", "SA 2Quad"]
        together = latency.totals(rows).loc[protocol]
        pd.testing.assert_frame_equal(alone, together, check_index_type=False, check_categorical=False)
        kinds = latency.by_kind(rows[rows["protocol"] == protocol], "bytes")
        assert kinds.index.name == "method" and (kinds == 1000).all(axis=None)


def test_columns_that_older_records_lack():
    rows = latency.operations(mixed())
    old, new = rows[rows["protocol"] == "stock"], rows[rows["protocol"] == "tuned"]
    assert (old["serial_bytes"] == old["bytes"]).all() and (new["serial_bytes"] == 1500).all()
    assert (old["offline_seconds"] == 0).all()
    # What a dealer of stock sends was not counted: it follows from the shapes, and tests hold that equal to a count.
    for method, part in old.groupby("method", observed=True):
        counted = latency.estimated({"": preset("cct_7_3x1", method)}, "stock").set_index(["layer", "kind"])
        places = list(zip(part["layer"], part["kind"], strict=True))
        assert part["offline_bytes"].tolist() == [counted["offline_bytes"][place] for place in places]
    assert not rows.isna().any(axis=None)
    totals = latency.totals(new)
    assert (totals["offline_seconds"] == 0.25).all() and (totals["offline_megabytes"] == 4).all()
    assert (totals["seconds_without_layernorm"] == 0.75 * totals["seconds"]).all()


def test_a_protocol_without_the_baseline_has_no_ratio():
    rows = latency.operations(dict([record("SA softmax"), record("SA 2Quad"), record("SA 2Quad", "tuned")]))
    assert latency.totals(rows)["ratio"].isna().to_dict() == {
        ("stock", "SA softmax"): False,
        ("stock", "SA 2Quad"): False,
        ("tuned", "SA 2Quad"): True,
    }
    with pytest.raises(KeyError):
        latency.totals(rows, baseline="EA L2Q")


def test_names_do_not_depend_on_the_protocol():
    for method in METHODS:
        assert name_of(record(method, "tuned")[0].network) == name_of(record(method)[0].network)


def test_networks_without_a_name_are_given_one():
    run, found = record("SA softmax")
    other = PrivateRun(preset("cct_7_3x1", width=128))
    with pytest.raises(ValueError, match="record 0 is of a network without a name: give names"):
        latency.operations({other: found})
    rows = latency.operations({run: found, other: found}, {run: "wide", other: "narrow"})
    assert list(latency.totals(rows[rows["protocol"] == "stock"], "wide").index) == ["wide"]
    assert latency.operations({}).empty
