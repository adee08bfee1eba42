"""Whatever was measured several times comes with its range into the table that a figure draws."""

import pytest

from salvit_core import preset
from salvit_core.experiments import accuracy, efficient, execute, latency, profiles, published

SIZE = profiles.profile("reference")


def assert_ranges(table, column="x"):
    low, middle, high = (table[f"{column}{end}"] for end in ("_low", "", "_high"))
    assert (low <= middle).all() and (middle <= high).all() and (low < high).any()


@pytest.fixture(scope="module")
def searches():
    plan = accuracy.plan(SIZE, "cifar10")
    table = accuracy.results({"cifar10": plan}, execute.recorded(plan.values(), "reference"))
    table = accuracy.over_seeds(table, SIZE, 0, "reference")
    for network in (None, "cct_7_3x1"):
        runs = accuracy.private_runs(table, SIZE.queries, network=network)
        table = accuracy.with_costs(table, execute.recorded(runs, "reference"), network)
    return table


@pytest.mark.parametrize(
    "name", ["SA softmax", "SA 2ReLU", "SA scaling", "EA L2Q", *(f"SAL-ViT B={b}" for b in range(1, 4))]
)
def test_a_counterpart_is_the_papers_network_of_that_name(name):
    assert accuracy.counterpart(preset("cct_4_3x1", name), "cct_7_3x1") == preset("cct_7_3x1", name)
    placed = preset("cct_4_3x1", "SA L2Q", attention=("external", "self", "external", "self"))
    assert accuracy.counterpart(placed, "cct_7_3x1") == preset("cct_7_3x1", "SAL-ViT B=2")


def test_accuracy_is_a_mean_over_the_seeds_on_record(searches):
    for _, line in searches.iterrows():
        runs = [accuracy.plan(SIZE, "cifar10", seed)[line["method"]] for seed in range(3)]
        found = [each["metrics"]["test_accuracy"] for each in execute.recorded(runs, "reference").values()]
        assert line["n"] == len(found) and line["accuracy"] == pytest.approx(sum(found) / len(found))
        assert (line["accuracy_low"], line["accuracy_high"]) == (min(found), max(found))


def test_figures_have_the_latency_of_the_papers_network(searches):
    """Of each row the same as Table 4's and Table 3's: medians of the same queries."""
    ours = published.variants()
    for name, row in {"SA softmax": "SA softmax", "EA L2Q": "EA L2Q", "SAS-L B=2": "SAL-ViT B=2"}.items():
        line = searches.set_index("method").loc[name]
        for protocol in ("stock", "tuned"):
            assert line[accuracy.seconds_of(searches, protocol)] == pytest.approx(ours.loc[row, f"{protocol} s"])
    drawn = accuracy.latency_figures(searches, ["cifar10"], 2)["figure_1_accuracy_latency"]["ours, cifar10, tuned"]
    assert drawn.set_index("method").loc["SA softmax", "x"] == pytest.approx(ours.loc["SA softmax", "tuned s"])
    assert drawn["x"].notna().all() and (drawn["x_low"] <= drawn["x"]).all()


def test_latency_of_figures_1_and_6(searches):
    large = accuracy.full_size("reference")
    drawn = accuracy.latency_figures(searches, ["cifar10"], 2, large)
    points, more = large["cifar10"].set_index("method"), drawn["figure_5_accuracy_latency"]
    assert points.loc["SA softmax", "accuracy"] > 80 and {"SAL-ViT B=3", "EA softmax"} < set(points.index)
    assert points.loc["SA softmax", "x"] == searches.set_index("method").loc["SA softmax", "large_tuned_seconds"]
    assert drawn["figure_1_accuracy_latency"]["CCT-7/3x1, cifar10, tuned"] is large["cifar10"]
    assert more["CCT-7/3x1, cifar100, tuned"] is large["cifar100"]
    assert list(drawn["figure_6_normalizers"]) == ["cifar10, B = 2, stock", "cifar10, B = 2, tuned"]
    for name in ("figure_1_accuracy_latency", "figure_6_normalizers"):
        for title, table in drawn[name].items():
            if title.startswith("paper"):
                assert "x_low" not in table
            else:
                assert_ranges(table)
    (row, *_) = searches.dropna(subset=["tuned_seconds"]).to_dict("records")
    assert row["tuned_seconds_low"] == row["tuned_seconds"] < row["tuned_seconds_high"]  # the least counts


def test_efficient_attention():
    plan = efficient.plan(SIZE, ["cifar10"])
    trained = execute.recorded(plan.values(), "reference")
    clear, private = efficient.clear_runs(plan), efficient.private_runs(plan, SIZE.queries)
    spent = execute.recorded(clear.values(), "reference")
    on_shares = execute.recorded([run for runs in private.values() for run in runs], "reference")
    table = efficient.comparison(plan, trained, clear, spent, private, on_shares)
    panels, _ = efficient.panels(table)
    assert_ranges(panels["in the clear"])
    assert_ranges(panels["on shares"])
    assert "x_low" not in panels["FLOPs"]  # these are counted
    shown = efficient.shown(table)
    assert {"accuracy", "ms_64", "private_s"} < set(shown) and set(shown) < set(table)
    assert not {"ms_64_low", "private_s_high", "iqr_64"} & set(shown)


def test_growth_and_table_2():
    free, paid = efficient.resolution_runs(SIZE)
    grown, bought = (execute.recorded(each.values(), "reference") for each in (free, paid))
    assert_ranges(efficient.growth(free, grown, paid, bought), "ms")
    layers, _ = efficient.table_2_runs(SIZE)
    rows = efficient.layer_rows(layers, execute.recorded(layers.values(), "reference"))
    for table in efficient.table_2_panels(rows).values():
        assert (table["low"] < table["high"]).any()
        assert (table["low"] <= table["high"]).all() and (table.drop(columns=["low", "high"]) >= 0).all(axis=None)


def test_table_2_is_shown_by_protocol():
    layers, networks = efficient.table_2_runs(SIZE)
    found = [execute.recorded(runs.values(), "reference") for runs in (layers, networks)]
    table = efficient.table_2(layers, found[0], networks, found[1])
    shown = efficient.shown_table_2(table)
    assert list(dict.fromkeys(place for place, _ in shown)) == ["stock", "tuned", "paper"]
    assert list(shown.index) == list(table.index)
    assert shown["tuned", "s"].tolist() == table["tuned seconds"].astype(float).round(2).tolist()
    assert shown["stock", "right"].tolist() == table["stock faithful"].tolist()
    table.loc["SOFT", "tuned faithful"] = float("nan")
    (told,) = [line for line in efficient.said_of_table_2(table).split("\n") if "**SOFT**" in line]
    assert "answers wrong and not on record" in told


def test_a_variants_totals_are_the_range_that_its_bars_show():
    layers, _ = efficient.table_2_runs(SIZE)
    found = execute.recorded([run for (_, protocol), run in layers.items() if protocol == "tuned"], "reference")
    rows = latency.operations(found, {run: name for (name, _), run in layers.items() if run in found})
    totals, bars = latency.totals(rows), latency.by_kind(rows, "seconds", ranges=True)
    assert bars["low"].tolist() == pytest.approx(totals["low"].tolist())
    assert bars["high"].tolist() == pytest.approx(totals["high"].tolist())
