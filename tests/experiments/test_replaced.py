"""Replacement runs: records, keys, what they wait for, the tables that are made of them, and what they cost."""

import dataclasses
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from prose import held, page, prose

from salvit_core import build, preset, workspace
from salvit_core.experiments import choices, evidence, execute, profiles, replaced, store
from salvit_core.experiments.runs import EvaluationRun, ReplacementRun, run_of
from salvit_core.models import cost
from salvit_core.private import Link
from salvit_core.private.estimation import estimate
from salvit_core.replacement.pruning import Pruning
from salvit_core.training import evaluate

SMOKE = profiles.profile("smoke")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    before, workspace.ROOT = workspace.ROOT, tmp_path_factory.mktemp("root")
    yield workspace.ROOT
    workspace.ROOT = before


@pytest.fixture(scope="module")
def made():
    return replaced.plan(SMOKE, "digits")


@pytest.fixture(scope="module")
def found(root, made):
    return {run: execute.ensure(run) for run in made.values()}


def test_a_record_has_what_was_asked_for(made, found):
    run = made["multi_lstm", 0.0, 0]
    facts = found[run]["metrics"]
    assert list(facts["stages"]) == ["attention", "blocks", "head"]
    assert facts["teacher_accuracy"] == execute.ensure(run.teacher)["metrics"]["test_accuracy"]
    assert facts["test_accuracy"] == facts["stages"]["head"]["test_accuracy"]
    assert [entry["stage"] for entry in found[run]["history"]] == ["attention", "blocks", "head"]
    pruned = found[made["multi_lstm", 0.5, 0]]["metrics"]
    assert pruned["parameters"] < pruned["parameters_before"] == facts["parameters"]
    assert {"masked_accuracy", "sparsity", "channels", "hidden"} < set(pruned)
    assert sum(row["pruned"] for row in pruned["channels"]) == sum(row["hidden"] for row in pruned["channels"]) // 2


def test_weights_are_kept_and_are_those_of_the_record(made, found):
    for run, record in found.items():
        model = execute.trained(run)
        assert cost.parameters(model) == record["metrics"]["parameters"]
        data = execute.dataset(run.data, run.images)
        assert evaluate(model, data.test)["accuracy"] == record["metrics"]["test_accuracy"]
        assert not store.path(run, ending=".unfinished").exists()
        assert EvaluationRun(run).trained.network.attention == ("multi_lstm",) * 4


def test_a_record_is_read_back_as_its_run(made, found):
    for run, record in found.items():
        assert run_of(json.loads(json.dumps(record))) == run
        assert (
            run_of({"key": "", "study": "encrypted", "config": dataclasses.asdict(EvaluationRun(run))}).trained == run
        )


def test_a_key_has_what_changes_the_result_and_nothing_else(made):
    run = made["multi_lstm", 0.0, 0]
    keys = {store.key(each) for each in made.values()}
    assert len(keys) == len(made)
    other = dataclasses.replace(run.distillation, loss="similarity")
    assert store.key(dataclasses.replace(run, distillation=other)) not in keys
    assert store.key(dataclasses.replace(run, pruning=Pruning())) not in keys
    assert store.key(ReplacementRun(run.teacher, dataclasses.replace(run.distillation))) == store.key(run)
    assert made["multi_lstm", 0.5, 0].unpruned() == run


def test_tables(made, found):
    table = replaced.accuracies(made, found)
    assert list(table["variant"]) == ["teacher", "multi-head BiLSTM"]
    short = replaced.summary(table)
    facts = found[made["multi_lstm", 0.0, 0]]["metrics"]
    assert short.loc["multi-head BiLSTM", "kept"] == pytest.approx(facts["test_accuracy"] - facts["teacher_accuracy"])
    assert short.loc["teacher", "parameters"] < short.loc["multi-head BiLSTM", "parameters"]
    assert "multi-head BiLSTM" in replaced.said_of_accuracy(table)
    lost = replaced.pruned(made, found)
    assert lost["share"].tolist() == [50] and "50 % of the hidden units" in replaced.said_of_pruning(lost)
    channels = replaced.pruned_channels(found[made["multi_lstm", 0.5, 0]])
    assert channels.shape == (4, 4) and channels.to_numpy().mean() == pytest.approx(50)


def test_a_spread_is_the_seeds_standard_deviation():
    rows = [{"variant": "teacher", "seed": seed, "accuracy": a} for seed, a in enumerate((50.0, 52.0, 57.0))]
    table = pd.DataFrame(rows).assign(kept=0.0, after_attention=0.0, after_blocks=0.0, parameters=1)
    short = replaced.summary(table)
    assert short.loc["teacher", "accuracy"] == 53 and short.loc["teacher", "seeds"] == 3
    assert short.loc["teacher", "spread"] == pytest.approx((13) ** 0.5)


def test_nothing_on_record_gives_empty_tables_and_says_so(made):
    assert replaced.accuracies(made, {}).empty and replaced.summary(replaced.accuracies(made, {})).empty
    assert replaced.said_of_accuracy(replaced.accuracies(made, {})) == "No replacement is on record."
    assert replaced.said_of_pruning(replaced.pruned(made, {})) == "No pruned network is on record."


def test_rounds_of_a_recurrence_grow_with_its_steps_and_not_with_the_batch():
    """What notebook 08 concludes, by count."""
    small = replaced.networks(SMOKE, "digits")
    configs = {"SA softmax": small["SA softmax"], "multi-head BiLSTM": small["multi-head BiLSTM"]}
    scan = dataclasses.replace(small["SA softmax"], attention="parallel_scan")
    table = replaced.priced({**configs, "parallel scan": scan}, (1, 4)).set_index(["method", "batch"])
    rounds, mb = table["rounds"], table["mb"]
    assert rounds["multi-head BiLSTM", 1] > 3 * rounds["SA softmax", 1]
    assert rounds["parallel scan", 1] < rounds["SA softmax", 1]
    assert rounds["multi-head BiLSTM", 4] < 1.05 * rounds["multi-head BiLSTM", 1]
    assert mb["multi-head BiLSTM", 4] > 3 * mb["multi-head BiLSTM", 1]


def test_notebook_08_concludes_what_is_counted():
    """Of the reference networks: orders and the two sizes that its conclusion names."""
    size = profiles.profile("reference")
    table = replaced.priced(replaced.networks(size, "cifar10")).set_index(["method", "batch"])
    rounds, mb = table["rounds"].xs(1, level="batch"), table["mb"].xs(32, level="batch")
    ascending = ["mixer", "SA L2Q", "parallel scan", "SA softmax", "multi-head BiLSTM"]
    assert rounds[ascending].tolist() == [141, 145, 161, 185, 1913]
    for batch in (1, 32):
        for where in ("LAN", "WAN"):
            seconds = table[where].xs(batch, level="batch")
            assert seconds.idxmax() == "multi-head BiLSTM" and seconds.idxmin() == "mixer", (where, batch)
    assert round(mb["multi-head BiLSTM"]) == 157 and round(mb["SA softmax"]) == 146


def test_notebook_08_solves_its_exercise(monkeypatch):
    """From the two tables that it names; and what a link adds is what the tables of links say."""
    monkeypatch.setattr(workspace, "ROOT", Path(__file__).parents[2])
    size = profiles.profile("reference")
    softmax = replaced.networks(size, "cifar10")["SA softmax"]
    costs = replaced.priced({"SA softmax": softmax})
    table = pd.concat([costs, replaced.priced(replaced.removed(size, "cifar10"))]).set_index(["method", "batch"])
    told = prose("08")
    found = {}
    for batch in (1, 32):
        whole, half, ours = (table.loc[(name, batch)] for name in ("0% removed", "50% removed", "SA softmax"))
        assert whole["serial_mb"] > ours["serial_mb"] and whole["rounds"] > ours["rounds"]
        gain, more = (ours["serial_mb"] - half["serial_mb"]) / 44, half["rounds"] - ours["rounds"]
        found[batch] = (gain, more, 2 * gain / more, half, ours)
    gain, more, rtt, half, ours = found[32]
    assert (
        f"At 32 images it sends {half['serial_mb']:.1f} MB for softmax attention's {ours['serial_mb']:.1f}, so that it "
        f"gains {gain:.2f} s, and takes {half['rounds']:,.0f} rounds for {ours['rounds']:.0f}, {more:,.0f} more. These "
        f"cost as much where the round trip is {1e3 * rtt:.2f} ms:"
    ) in told
    gain, more, rtt, *_ = found[1]
    assert f"At one image it gains {1e3 * gain:.0f} ms for {more:,.0f} rounds: below {1e3 * rtt:.3f} ms," in told
    runs = replaced.clear_runs(replaced.networks(size, "cifar10"))
    clear = replaced.clear(runs, execute.recorded(runs.values(), "reference"))
    lstm, plain = clear.loc["multi-head BiLSTM"], clear.loc["SA softmax"]
    assert (
        f"take {lstm['ms_1']:.1f} ms an image with the LSTM and {plain['ms_1']:.1f} with softmax, "
        f"{lstm['ms_32']:.2f} and {plain['ms_32']:.2f} at batch 32."
    ) in told
    shown = replaced.waits(costs, replaced.CONNECTIONS["WAN"]).loc["SA softmax"]
    assert shown.tolist() == pytest.approx(costs["WAN"].tolist()) and list(shown.index) == ["batch 1", "batch 32"]


def test_the_book_says_what_replacements_take_on_shares(monkeypatch):
    here = Path(__file__).parents[2]
    monkeypatch.setattr(workspace, "ROOT", here)
    size = profiles.profile("reference")
    runs = replaced.private_runs(size, replaced.networks(size, "cifar10"))
    seconds = replaced.on_links(runs, execute.recorded(runs.values(), "reference"))["loopback"].unstack()
    times = seconds / seconds.loc["SA softmax"]
    lstm, scan, mixer = (times.loc[replaced.NAMES[name]] for name in ("multi_lstm", "parallel_scan", "mixer"))
    told = page("results.md")
    assert (
        f"FAR's own block takes {lstm[1]:.1f} times the seconds of softmax attention at one image and {lstm[32]:.1f} "
        f"times at 32; a parallel scan takes {scan[1]:.2f} and {scan[32]:.2f} times as long, a mixer {mixer[1]:.2f} "
        f"and {mixer[32]:.2f} (one query each"
    ) in told


def test_units_that_are_removed_take_bytes_away_and_no_round():
    table = replaced.priced(replaced.removed(profiles.profile("reference"), "cifar10"))
    assert list(table["method"].cat.categories) == ["0% removed", "25% removed", "50% removed", "75% removed"]
    for _, part in table.groupby("batch"):
        assert part["rounds"].nunique() == 1
        assert part["mb"].is_monotonic_decreasing and part["dealer_mb"].is_monotonic_decreasing
        assert part["mb"].iloc[3] < 0.75 * part["mb"].iloc[0]


WORDS = {
    "attention, drawn anew": "softmax attention, drawn anew",
    "multi-head BiLSTM": "FAR's BiLSTM",
    "parallel scan": "the parallel scan",
    "mixer": "the mixer",
    "SA L2Q": "L2Q",
    "EA softmax": "external attention",
    "ReLU linear": "ReLU linear attention",
}


def test_notebook_08_concludes_what_was_trained(monkeypatch):
    """Accuracies with their spread, what pruning leaves, and seconds beside them."""
    monkeypatch.setattr(workspace, "ROOT", Path(__file__).parents[2])
    size = profiles.profile("reference")
    plan = replaced.plan(size, "cifar10")
    known = execute.recorded(plan.values(), "reference")
    assert len(known) == len(plan) == 36
    short = replaced.summary(replaced.accuracies(plan, known))
    kept = short["kept"].drop("teacher").sort_values(ascending=False)
    spread, scan, fars = short["spread"].drop("teacher"), short.loc["parallel scan"], short.loc["multi-head BiLSTM"]
    fresh, by = short.loc["attention, drawn anew"], replaced.pruned(plan, known).groupby("share")["change"].mean()
    runs = replaced.private_runs(size, replaced.networks(size, "cifar10"))
    seconds = replaced.on_links(runs, execute.recorded(runs.values(), "reference"))
    loop, wan = (seconds[where].unstack("batch") for where in ("loopback", "WAN"))
    times = loop / loop.loc["SA softmax"]
    assert (short["seeds"] == 3).all() and kept.idxmax() == "ReLU linear" and kept["SA L2Q"] > kept["parallel scan"]
    assert (times.loc["ReLU linear"] < times.loc["parallel scan"]).all()
    assert times.loc["SA L2Q", 1] < times.loc["parallel scan", 1] < times.loc["SA L2Q", 1] + 0.3
    assert wan.loc["SA L2Q", 1] < wan.loc["parallel scan", 1] < wan.loc["ReLU linear", 1]
    held(
        "08",
        f"(CIFAR-10, 15,000 images, 3 seeds, points from the teacher's {short.loc['teacher', 'accuracy']:.1f} %): "
        + ", ".join(f"{WORDS.get(name, name)} {value:+.1f}" for name, value in kept.items()),
        f"differ by {spread.min():.1f} to {spread.max():.1f} (standard deviation)",
        f"ends {fresh['accuracy'] - scan['accuracy']:.1f} points below softmax attention that was drawn anew, "
        "and takes {:.2f} of its seconds on shares at one image, {:.2f} at 32".format(*times.loc["parallel scan"]),
        f"loses {fresh['accuracy'] - fars['accuracy']:.1f} points against it and takes "
        "{:.1f} and {:.1f} times as long".format(*times.loc["multi-head BiLSTM"]),
        "takes {:.2f} and {:.2f} of softmax attention's seconds".format(*times.loc["ReLU linear"]),
        f"L2Q ({times.loc['SA L2Q', 1]:.2f} and {times.loc['SA L2Q', 32]:.2f}) is ahead of the scan at one image",
        f"({wan.loc['parallel scan', 1]:.1f} s for {wan.loc['ReLU linear', 1]:.1f}) and behind L2Q "
        f"({wan.loc['SA L2Q', 1]:.1f} s)",
        f"accuracy changes by {by[25]:+.1f}, {by[50]:+.1f} and {by[75]:+.1f} points",
    )


def test_the_campaign_trains_the_reference_replacements():
    every = evidence.campaign()
    runs = [run for run in every if isinstance(run, ReplacementRun)]
    plan = replaced.plan(profiles.profile("reference"), "cifar10")
    assert set(plan.values()) == set(runs)
    assert len({run.seed for run in runs}) == 3 and {run.images for run in runs} == {15_000}
    assert {run.teacher for run in runs} < set(every)


def test_importance_is_shown_without_its_diagonal(root, made, found):
    here = replaced.with_weights(made, "local")
    assert list(here) == ["teacher", "multi-head BiLSTM", "multi-head BiLSTM, pruned 50%"]
    models = {name: execute.trained(run) for name, run in here.items()}
    images = torch.randn(2, 1, 8, 8)
    moved = replaced.importance(models, images)
    shown = replaced.heat(moved)
    assert all(picture.shape == (16, 16) and pd.isna(picture.diagonal()).all() for picture in shown.values())
    rows = replaced.patches(models, moved, images)
    assert list(rows)[0] == "teacher, rollout" and all(
        len(row) == 2 and row[0].shape == (4, 4) for row in rows.values()
    )


def test_the_priced_search_may_choose_a_recurrence(root):
    """The price of a scan has its sigmoid in it, that of an LSTM its steps; the search runs to its end."""
    search, prices = replaced.choice(SMOKE, "digits")
    assert list(prices) == ["self", "external", "scaling", "parallel_scan", "mixer"] and min(prices.values()) > 0
    assert search.search.choices == tuple(prices) and search.search.budget > 4 * min(prices.values())
    record = execute.ensure(search)
    assert set(record["metrics"]["architecture"]) <= set(prices)


@pytest.mark.parametrize("name, data", [("smoke", "digits"), ("reference", "cifar10")])
def test_every_choice_of_a_layer_fits_the_budget(name, data):
    """With the base's own mechanism in the other layers: nothing is among the choices that can never be taken."""
    search, prices = replaced.choice(profiles.profile(name), data)
    layers = search.network.layers
    for by, price in prices.items():
        assert (layers - 1) * prices["self"] + price <= search.search.budget, by


def test_a_price_has_the_gates_of_a_recurrence_in_it():
    """On a link that has only rounds, one a second: what all but the MLP and the norms of a layer take."""
    link, found = Link(2.0, 1e30), {}
    for name in ("scaling", "parallel_scan", "multi_lstm"):
        config = preset("cct_2_3x1", attention=name)
        steps = estimate(build(config), (1, 1, 8, 8)).operations
        layers = steps[steps["layer"].str.startswith("block")]
        found[name] = layers["rounds"].sum() / 2, choices.prices({name: config}, link)[name]
    for name, (rounds, price) in found.items():  # what is not attention's is the same in all three
        assert rounds - found["scaling"][0] == pytest.approx(price - found["scaling"][1], abs=1.5), name
    assert found["multi_lstm"][1] > found["parallel_scan"][1] > found["scaling"][1]


@pytest.mark.processes
def test_seconds_on_links_are_per_image(root):
    configs = {"SA softmax": preset("cct_2_3x1"), "multi-head BiLSTM": preset("cct_2_3x1", attention="multi_lstm")}
    runs = replaced.private_runs(profiles.profile("reference"), configs)
    assert list(runs) == [(name, batch) for batch in (1, 32) for name in configs]
    some = {which: run for which, run in runs.items() if which[0] == "multi-head BiLSTM"}
    table = replaced.on_links(some, execute.collect(some.values()))
    assert table["right"].all() and (table["WAN"] > table["LAN"]).all() and (table["LAN"] > table["loopback"]).all()
    waits = table["WAN"] - table["loopback"]
    assert waits["multi-head BiLSTM", 32] < waits["multi-head BiLSTM", 1] / 16  # the rounds are shared
