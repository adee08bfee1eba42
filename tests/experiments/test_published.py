"""The reviewer's tables are those of the records: each number found again in another way, and none twice."""

import re
import statistics
from collections import defaultdict

import pandas as pd
import pytest

from salvit_core import METHODS
from salvit_core.experiments import evidence, execute, latency, profiles, published, store
from salvit_core.experiments.runs import SearchRun, name_of, run_of
from salvit_core.search.sas import Search


def private():
    return {run_of(record): record for record in store.load("private", "reference")}


def single(run):
    """One query of one image of the whole network, on the bare loopback; seed 1 is of placements."""
    return (run.queries, run.batch, run.link, run.alone, run.seed) == (1, 1, None, False, 0)


def variants():
    """What the records say of the paper's variants, by protocol and method."""
    found = defaultdict(list)
    for run, record in private().items():
        name = name_of(run.network)
        if name and name[0] == "cct_7_3x1" and name[1] in METHODS and run.provider == "TFP" and single(run):
            found[run.protocol, name[1]].append(record)
    return found


def test_variants_are_all_queries_on_record():
    found, table = variants(), published.variants()
    assert list(table.index) == list(METHODS) and {len(each) for each in found.values()} == {3}
    for (protocol, method), records in found.items():
        seconds = [latency.costs(record)["seconds"] for record in records]
        row = table.loc[method]
        assert row[f"{protocol} s"] == pytest.approx(statistics.median(seconds))
        assert row[f"{protocol} range"] == f"{min(seconds):.2f} to {max(seconds):.2f}"
        assert row[f"{protocol} rounds"] == latency.costs(records[0])["rounds"]
        worst = max(record["metrics"]["logit_error"] for record in records)
        assert row[f"{protocol} error"] == f"{worst:.2g}"


@pytest.mark.parametrize("number", [3, 4])
def test_latencies_are_ratios_beside_the_papers(number):
    table, paper = published.TABLES[number](), latency.paper(number).query("dataset == 'cifar10'")
    assert table.loc["SA softmax", "paper ratio"] == table.loc["SA softmax", "stock ratio"] == 1
    theirs = paper.groupby("method", sort=False)["latency_s"].first()
    for method in table.index:
        row = table.loc[method]
        assert row["paper s"] == theirs[method]
        assert row["tuned difference (%)"] == pytest.approx(100 * (row["tuned ratio"] / row["paper ratio"] - 1))
    ours = published.variants()["tuned ratio"]
    assert table["tuned ratio"].to_dict() == {name: pytest.approx(ours[name]) for name in table.index}


def test_placements_have_the_same_self_attention_elsewhere():
    names = published.placed()
    for run in names:
        heads = [each for layer in run.network.attention for each in ([layer] * 4 if isinstance(layer, str) else layer)]
        assert heads.count("self") == 12 and len(heads) == 28
    table = published.placements()
    assert list(table.index) == list(dict.fromkeys(names.values())) and table.notna().all(axis=None)
    assert table.filter(like="tuned right").all(axis=None)


def test_table_2_has_every_mechanism_with_both_protocols():
    table = published.table_2()
    layers = defaultdict(set)
    for run in private():
        if run.alone and run.queries == 2 and run.network.image == 32 and run.network.width == 256:
            layers[run.network].add(run.protocol)
    assert len(table) == 10 and not table[["stock seconds", "tuned seconds", "tuned network s"]].isna().any(axis=None)
    assert table.loc["CosFormer", "paper s"] == ">61.9"
    assert sum(each == {"stock", "tuned"} for each in layers.values()) >= 10


def accuracies(data):
    """What the records of full trainings say, by a row's key, one list of seeds each."""
    found = defaultdict(list)
    for study in ("training", "search"):
        for record in store.load(study, "reference"):
            run = run_of(record)
            if run.images or run.data != data or run.teacher:
                continue
            plain = getattr(run, "search", None)
            if plain and (
                type(plain) is not Search or plain.granularity != "layer" or plain.folded or not plain.weight
            ):
                continue
            if len(set(run.network.attention)) > 1:
                continue
            name = run.search.rule if isinstance(run, SearchRun) else run.network.attention[0]
            kind = (
                run.network.layers,
                name,
                run.network.normalizer,
                getattr(getattr(run, "search", None), "budget", 0),
            )
            found[kind].append(record["metrics"]["test_accuracy"])
    return found


def test_accuracies_are_means_over_the_seeds_on_record():
    table, found = published.accuracies(), accuracies("cifar10")
    keys = {
        "SA softmax": ("self", "softmax", 0),
        "SA 2Quad": ("self", "2quad", 0),
        "SA scaling": ("scaling", "softmax", 0),
        "EA softmax": ("external", "softmax", 0),
        "EA L2Q": ("external", "l2q", 0),
        **{f"SAS-L B={b}": ("top", "l2q", b) for b in (1, 2, 3)},
        **{f"SAS-L-WC B={b}": ("bottom", "l2q", b) for b in (1, 2, 3)},
        "SAS-L B=2, 2ReLU": ("top", "2relu", 2),
    }
    for method, key in keys.items():
        for size, layers in (("small network", 4), ("CCT-7/3x1", 7)):
            values = found.get((layers, *key), [])
            row = table.loc[method, size]
            if not values:
                assert pd.isna(row["mean"])
                continue
            assert row["n"] == len(values) and row["mean"] == pytest.approx(statistics.fmean(values))
            assert (row["low"], row["high"]) == (min(values), max(values))
    planned = {label for label, _ in evidence.named(profiles.profile("reference"))}
    assert planned <= set(table.index)  # those that are not trained yet, too
    assert (table.xs("n", axis=1, level=1) >= 0).all(axis=None)
    assert table.loc["SAS-L-WC B=3", ("paper", "accuracy")] == 95.16
    assert table.loc["SA softmax", ("paper", "accuracy")] == 95.56


def test_every_training_on_record_has_one_row():
    """Of the campaign's rows no name stands for two networks, and no network has two names."""
    for name in published.SIZES:
        names = defaultdict(set)
        for label, run in evidence.named(profiles.profile(name)):
            names[label].add(run.label().rpartition(" seed ")[0])
        assert all(len(each) == 1 for each in names.values())
    assert (published.spread(evidence.named(profiles.profile("reference")))["n"] <= evidence.SEEDS).all()


def test_mechanisms_are_those_trained_alike():
    table = published.mechanisms()
    trained = [
        record["metrics"]["test_accuracy"]
        for record in store.load("training", "reference")
        if (run := run_of(record)).images == 15_000 and run.recipe.epochs == 6 and len(set(run.network.attention)) == 1
    ]
    assert table["accuracy (%)"].tolist() == sorted(trained, reverse=True) and len(table) == 18


def test_a_table_as_html_says_what_is_not_there():
    """A column has two decimals, or none where all of it is whole: 61.00 stands beside 60.50, and rounds are rounds."""
    columns = {"a": [1.234, None], "b": [1024.0, 2.0], "c": [61.0, 60.5], "d": [None, 3.0]}
    drawn = published.shown(pd.DataFrame(columns, index=pd.Index(["x", "y"], name="method")))
    cells = re.findall("<td>(.*?)</td>", drawn)
    assert cells == ["x", "1.23", "1024", "61.00", "-", "y", "-", "2", "60.50", "3"]


def test_what_is_not_on_record_stays_empty(monkeypatch):
    real = execute.recorded

    def fewer(runs, source):
        found = real(runs, source)
        return {run: record for run, record in found.items() if name_of(run.network) != ("cct_7_3x1", "SA 2ReLU")}

    monkeypatch.setattr(published.execute, "recorded", fewer)
    table = published.variants()
    assert table.loc["SA 2ReLU", ["stock s", "stock range", "WAN s"]].isna().all()
    assert table.drop("SA 2ReLU").drop(columns="paper ratio").notna().all(axis=None)
