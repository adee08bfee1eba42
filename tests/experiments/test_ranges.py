"""Whatever was measured several times comes with its range into the table that a figure draws."""

import pytest

from salvit_core.experiments import accuracy, efficient, execute, latency, profiles

SIZE = profiles.profile("reference")


def assert_ranges(table, column="x"):
    low, middle, high = (table[f"{column}{end}"] for end in ("_low", "", "_high"))
    assert (low <= middle).all() and (middle <= high).all() and (low < high).any()


@pytest.fixture(scope="module")
def searches():
    plan = accuracy.plan(SIZE, "cifar10")
    table = accuracy.results({"cifar10": plan}, execute.recorded(plan.values(), "reference"))
    return accuracy.with_costs(table, execute.recorded(accuracy.private_runs(table, SIZE.queries), "reference"))


def test_latency_of_figures_1_and_6(searches):
    drawn = accuracy.latency_figures(searches, ["cifar10"], 2)
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


def test_a_variants_totals_are_the_range_that_its_bars_show():
    layers, _ = efficient.table_2_runs(SIZE)
    found = execute.recorded([run for (_, protocol), run in layers.items() if protocol == "tuned"], "reference")
    rows = latency.operations(found, {run: name for (name, _), run in layers.items() if run in found})
    totals, bars = latency.totals(rows), latency.by_kind(rows, "seconds", ranges=True)
    assert bars["low"].tolist() == pytest.approx(totals["low"].tolist())
    assert bars["high"].tolist() == pytest.approx(totals["high"].tolist())
