"""What two places tell of one thing agrees: the same records, the same counts, and a word where they must differ."""

import dataclasses
import statistics

import pandas as pd
import pytest

from salvit_core import preset
from salvit_core.experiments import (
    ablations,
    accuracy,
    encrypted,
    execute,
    latency,
    learned,
    links_and_dealers,
    profiles,
)
from salvit_core.experiments.runs import LearnedRun, PrivateRun

SIZE = profiles.profile("reference")


def query(seconds, faithful=True):
    """A record of one query."""
    row = {"query": 0, "layer": "", "kind": "MLP", "seconds": seconds, "rounds": 3, "bytes": 100}
    return {"metrics": {"operations": [row], "faithful": faithful}}


def test_a_small_network_takes_the_least_of_its_queries():
    config = preset("cct_4_3x1", "SAL-ViT B=2")
    table = pd.DataFrame({"method": ["SAS-L B=2"], "config": [config]})
    runs = [PrivateRun(accuracy.measured_as(config), "tuned", query=i) for i in range(3)]
    found = dict(zip(runs, (query(1.3), query(0.7), query(0.9, faithful=False)), strict=True))
    row = accuracy.with_costs(table, found).iloc[0]
    assert (row["tuned_seconds"], row["tuned_rounds"]) == (0.7, 3)
    assert row["tuned_faithful"] == 0  # two of three are not all
    assert "seconds" not in row


@pytest.fixture(scope="module")
def searches():
    plans = {"cifar10": accuracy.plan(SIZE, "cifar10")}
    found = execute.recorded(plans["cifar10"].values(), "reference")
    table = accuracy.results(plans, found)
    return accuracy.with_costs(table, execute.recorded(accuracy.private_runs(table, SIZE.queries), "reference"))


def test_figure_1_has_sal_vit_left_of_softmax_attention_with_both_protocols(searches):
    """As Table 4 has it at full size: fewer rounds and bytes than softmax's are fewer seconds."""
    part = searches.set_index("method")
    soft, hybrids = part.loc["SA softmax"], part.loc[[f"SAS-L B={b}" for b in (1, 2, 3)]]
    for seconds in ("seconds", "tuned_seconds"):
        assert (hybrids[seconds] < 0.8 * soft[seconds]).all()
    # Of 64 tokens external attention has the fewer bytes and the more rounds, and these decide.
    assert hybrids["tuned_bytes"].is_monotonic_increasing and hybrids["tuned_rounds"].is_monotonic_decreasing
    assert hybrids["tuned_seconds"].is_monotonic_decreasing
    said = accuracy.said_of_searches(searches, "cifar10", [1, 2, 3], 2, SIZE.queries)
    assert "SAL-ViT at B = 2 takes 0.73 of SA softmax's latency" in said and "the least of 3" in said


def test_what_tuned_moves_in_notebook_02_is_of_one_version():
    counted = ablations.counted_variants("cct_7_3x1").groupby("method", observed=True)[["rounds", "bytes"]].sum()
    for variant, row in (("softmax", "SA softmax"), ("2Quad", "SA 2Quad"), ("L2Q element-wise", "SA L2Q")):
        exact = latency.estimated({row: preset("cct_7_3x1", row)})
        assert counted.loc[variant].to_list() == [exact["rounds"].sum(), exact["bytes"].sum()]
    learnt = counted[counted.index.str.startswith("L2Q")]
    assert len(learnt) == 5 and len(learnt.drop_duplicates()) == 1
    more = learnt.iloc[0] - counted.loc["2Quad"]
    nothing = pd.DataFrame({"accuracy": [], "low": [], "high": []}, pd.MultiIndex.from_arrays([[], []]))
    said = ablations.said_of_ablations(nothing, pd.DataFrame(), ablations.counted_variants("cct_7_3x1"))
    assert f"{more['rounds']} rounds and {more['bytes'] / 1e6:.1f} MB, is the exact truncation" in said


def test_notebook_04_names_the_precision_of_either_accuracy():
    run = SIZE.training("cifar10", SIZE.config("cifar10", "SA L2Q"))
    training, reading = (execute.ensure(each, "reference")["metrics"] for each in (run, LearnedRun(run)))
    before = training["test_accuracy"]
    assert run.recipe.bf16 and before != reading["accuracy"]
    said = learned.said(reading, training, run.recipe)
    assert f"read in float32, has {reading['accuracy']:.2f} %" in said
    assert f"(its training, in bfloat16, counted {before:.2f} %)" in said
    assert "(its training" not in learned.said(reading, {"test_accuracy": reading["accuracy"]}, run.recipe)


def test_stock_s_seconds_are_one_number_in_notebooks_01_and_09():
    network, methods = SIZE.networks[0], links_and_dealers.paper_methods(SIZE)
    runs = [PrivateRun(preset(network, name), "stock", query=i) for name in methods for i in range(SIZE.queries)]
    mine = latency.totals(latency.operations(execute.recorded(runs, "reference")))["seconds"].rename(index=str)
    both, _ = links_and_dealers.both_protocols(SIZE, methods, "reference")
    theirs = links_and_dealers.table_4(both, methods)["stock_s"]
    assert theirs.to_dict() == mine.to_dict()
    config = preset(network, "SAL-ViT B=3")
    hybrid = [latency.costs(r)["seconds"] for run, r in both.items() if run in runs and run.network == config]
    assert statistics.median(hybrid) == theirs["SAL-ViT B=3"] == pytest.approx(7.5, abs=0.05)


def test_what_was_not_evaluated_takes_no_row_of_a_figure():
    plan = encrypted.evaluations(encrypted.networks(SIZE, "cifar10", "SAL-ViT B=2"), 256, 4, False, "SAL-ViT B=2")
    found = execute.recorded(plan.values(), "reference")
    assert 0 < len(found) < len(plan)
    (panel,) = encrypted.accuracy_panel(encrypted.answers(plan, found, {})).values()
    tuned = [f"{name}, tuned, 256 images" for name in ("SA softmax", "SA L2Q")]
    assert list(panel.index) == [*tuned, "SA L2Q, stock, 4 images"]
    assert not panel.isna().any(axis=None)


def test_logits_may_be_close_and_unfaithful():
    config = preset("cct_4_3x1", "SA 2ReLU")
    runs = [PrivateRun(config, "stock", query=i) for i in range(2)]
    far = dict(faithful=False, violations=["blocks.0.mlp.activation: error functions"], logit_error=0.02)
    table = latency.answers({runs[0]: {"metrics": far}})
    assert table.loc["SA 2ReLU", ["faithful", "close"]].to_list() == [False, True]
    table = latency.answers({runs[0]: {"metrics": far}, runs[1]: {"metrics": far | {"logit_error": 2.0}}})
    assert table.loc["SA 2ReLU", ["faithful", "close"]].to_list() == [False, False]


def test_a_layer_s_axis_goes_to_the_dearest_layer_of_any_method():
    names = ("SA softmax", "EA L2Q")
    rows = {
        protocol: latency.estimated({name: preset("cct_4_3x1", name) for name in names}, protocol)
        for protocol in ("stock", "tuned")
    }
    seen = {}
    for name in names:
        panels, ends = latency.layer_panels(rows, name, "bytes")
        assert list(panels) == list(ends) == ["MB, stock", "MB, tuned"]
        for protocol, (label, table) in zip(rows, panels.items(), strict=True):
            mine = rows[protocol][rows[protocol]["method"] == name]
            assert list(table.index) == list(mine["layer"].unique())
            assert table.to_numpy().sum() == pytest.approx(mine["bytes"].sum() / 1e6)
            seen.setdefault(label, []).append(table.sum(axis=1).max())
        last = ends
    assert last == pytest.approx({label: max(each) for label, each in seen.items()})


def test_a_choice_of_the_bar_is_the_study_s_network():
    config = links_and_dealers.network("cct_4_3x1", "SAL-ViT B=1", "scaling", "quad")
    assert config.attention == ("scaling", *["external"] * (config.layers - 1))
    assert (config.normalizer, config.activation) == ("scaling", "quad")
    plain = dataclasses.replace(config, activation="gelu")
    assert links_and_dealers.network("cct_4_3x1", "SAL-ViT B=1", "scaling", "gelu") == plain
